"""Prune by several recipes to several sparsities, and plot what each costs in perplexity.

python examples/sweep_and_plot.py [MODEL] [CALIBRATION] [TEST]

`besa compare` does this from the command line, with seeds, a table, and runs that are not repeated.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

import besa

RECIPES, SPARSITIES = ("magnitude", "wanda", "besa"), (0.3, 0.5, 0.6)


def main(
    model: str = "smollm2", calibration: str = "c4", test: str = "wiki", seqlen: int = 512
) -> dict[str, list[float]]:
    """Prune, measure and plot; returns the perplexities of each recipe by sparsity.

    Args:
        model: whatever `besa.compress` takes by name.
        calibration: text to calibrate on: an embedded one, or a file.
        test: text to measure on.
        seqlen: tokens of a sequence and of a window.
    """

    def perplexity(folder: str | Path) -> float:
        (value,) = besa.evaluate(folder, [test], window=seqlen, max_windows=10).perplexity.values()
        return value

    found: dict[str, list[float]] = {recipe: [] for recipe in RECIPES}
    for recipe in RECIPES:
        for sparsity in SPARSITIES:
            out = Path("sweep") / f"{recipe}-{sparsity}"
            if not out.exists():  # a folder appears whole or not at all: what is there is finished
                besa.compress(model, recipe, calibration, out=out, sparsity=sparsity, samples=8, seqlen=seqlen)
            found[recipe].append(perplexity(out))
            print(f"{recipe} at {sparsity:.0%}: {found[recipe][-1]:.2f}")

    figure, axes = plt.subplots()
    axes.axhline(perplexity(model), color="gray", linestyle="--", label="dense")
    for recipe, values in found.items():
        axes.plot([100 * sparsity for sparsity in SPARSITIES], values, marker="o", label=recipe)
    axes.set(xlabel="sparsity, %", ylabel="perplexity", yscale="log")
    axes.legend()
    figure.savefig("sweep.svg")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
