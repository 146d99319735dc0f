"""Table 4 of the paper: cycles of pruned models on the simulated ViTCoD accelerator, from their checkpoints alone.

    python -m experiments.table4 magnitude=DIR wanda=DIR sparsegpt=DIR besa=DIR

Writes `experiments/results/table4/table4.json`, `table4.md` and `table4.svg`: for each method the published formula,
the corrected one, the best threshold, the work bound, and the larger of loading and computing for several numbers of
tokens; beside them random masks on weights as large as LLaMA-7B's.
"""

from __future__ import annotations

import json
import textwrap
import time
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from matplotlib.figure import Figure

import besa
from besa.checkpoint.walk import StoredWeight
from besa.models.kinds import shortened
from besa.record import RECORD_NAME, RunRecord, now
from besa.report.markdown import table
from besa.simulator import Simulation, check_alike, described, simulate_weight
from besa.system.devices import resolve_device
from besa.system.machine import machine, versions

RESULTS = Path(__file__).parent / "results" / "table4"
RANDOM = [
    *((4096, 4096, sparsity, seed) for sparsity in (0.49, 0.5, 0.505, 0.54) for seed in range(3)),
    *((11008, 4096, sparsity, 0) for sparsity in (0.48, 0.5)),
]
TOKENS = (1, 8, 32, 128, 512)
COLORS = ["#6b6a64", "#56a0d3", "#0072b2", "#d55e00"]


def main(
    checkpoints: Annotated[list[str], typer.Argument(metavar="NAME=DIR...", help="Pruned checkpoints of one model.")],
) -> None:
    """Simulate all checkpoints and write the table."""
    folders = {name: Path(folder) for name, _, folder in (pair.partition("=") for pair in checkpoints)}
    simulations, seconds = {}, {}
    for name, folder in folders.items():
        began = time.perf_counter()
        simulations[name] = besa.simulate(folder, TOKENS)
        seconds[name] = time.perf_counter() - began
    check_alike(list(simulations.values()))
    result = {
        "command": ["python", "-m", "experiments.table4", *(f"{name}=…" for name in folders)],
        "methods": {
            name: _run(folders[name])
            | {"linears": len(simulation.linears), "seconds": seconds[name]}
            | simulation.model_dump(mode="json", include={"kinds", "block"})
            for name, simulation in simulations.items()
        },
        "verdict": _verdict(simulations),
        "random": [_random(*weight) for weight in RANDOM],
        "accelerator": besa.Accelerator().model_dump(mode="json"),
        "machine": machine(resolve_device("cpu")),
        "versions": versions(),
        "created": now(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "table4.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "table4.md").write_text(_markdown(simulations, result["random"]), encoding="utf-8")
    _draw(simulations, RESULTS / "table4.svg")


def _verdict(simulations: dict[str, Simulation]) -> dict[str, Any] | None:
    """Whether BESA gains most by the published formula, if it is there beside others."""
    gains = {
        name: [found.block.speedup[figure] or 0.0 for figure in list(found.block.each())[:2]]
        for name, found in simulations.items()
    }
    others = [gain for name, gain in gains.items() if name in ("wanda", "sparsegpt")]
    if "besa" not in gains or not others:
        return None
    said = ", ".join(f"{name} {published:.2f}× ({corrected:.2f}×)" for name, (published, corrected) in gains.items())
    holds = all(gains["besa"][0] > gain[0] for gain in others)
    return {"found": f"By the published (corrected) formula over dense, all linears together: {said}.", "holds": holds}


def _run(folder: Path) -> dict[str, Any]:
    """What is to be known of a checkpoint's making."""
    record = RunRecord.read(folder / RECORD_NAME)
    return {
        "recipe": record.recipe["name"],
        "sparsity": record.sparsity,
        "calibration": record.calibration,
        "pruned": record.created,
    }


def _random(rows: int, columns: int, sparsity: float, seed: int) -> dict[str, Any]:
    """A weight of which each row has lost the same number of weights, at random."""
    generator = torch.Generator().manual_seed(seed)
    zero_OI = torch.zeros(rows, columns, dtype=torch.bool)
    for own_OI in zero_OI.split(512):
        order = torch.rand(own_OI.shape, generator=generator)
        own_OI.scatter_(1, order.topk(round(sparsity * columns), dim=1).indices, True)
    began = time.perf_counter()
    found = simulate_weight(StoredWeight("random", "random", zero_OI, {}), TOKENS, besa.Accelerator())
    seconds = time.perf_counter() - began
    return {"seed": seed, "seconds": seconds} | found.model_dump(mode="json", exclude={"name", "block"})


def _markdown(simulations: dict[str, Simulation], random: list[dict[str, Any]]) -> str:
    """Speed-ups of whole blocks, then random masks, then cycles by linear."""
    dense = next(iter(simulations.values()))
    gains = [
        [described(figure), *(f"{simulation.block.speedup[figure]:.2f}×" for simulation in simulations.values())]
        for figure in dense.block.each()
    ]
    masks = [
        [
            f"{own['shape'][0]} × {own['shape'][1]}",
            f"{own['sparsity']:.1%}",
            str(own["seed"]),
            *(f"{own[f'cycles_{rule}']:,}" for rule in ("published", "corrected", "bound")),
        ]
        for own in random
    ]
    cycles = []
    for figure in dense.block.each():
        rows = {"dense": [column.dense.each()[figure] for column in [*dense.kinds, dense.block]]}
        rows |= {
            name: [own.each()[figure] for own in [*found.kinds, found.block]] for name, found in simulations.items()
        }
        cycles += [[described(figure), name, *(f"{n:,.1f}" for n in numbers)] for name, numbers in rows.items()]
    for name, found in simulations.items():
        cycles.append(["sparsity", name, *(f"{own.sparsity:.2%}" for own in [*found.kinds, found.block])])
    rules = [f"{rule} formula" for rule in ("published", "corrected")]
    names = shortened([kind.name for kind in dense.kinds])
    return "\n".join(
        [
            "Speed-up over the same weights without zeros, all linears of a block together:\n",
            table(["figure", *simulations], gains),
            "Cycles of random masks, the same number of zeros in each row:\n",
            table(["rows × columns", "sparsity", "seed", *rules, "work bound"], masks),
            "Cycles, mean over blocks:\n",
            table(["figure", "method", *names, "all"], cycles, words=2),
        ]
    )


def _draw(simulations: dict[str, Simulation], path: Path) -> None:
    """Bars of the speed-ups of whole blocks."""
    figures = list(next(iter(simulations.values())).block.each())
    with matplotlib.rc_context({"svg.hashsalt": "table4", "font.size": 9}):
        drawing = Figure(figsize=(9, 3.4), layout="constrained")
        axes = drawing.add_subplot()
        width = 0.8 / len(simulations)
        for place, (name, found) in enumerate(simulations.items()):
            x = [group - 0.4 + (place + 0.5) * width for group in range(len(figures))]
            ratios = [found.block.speedup[figure] or 0.0 for figure in figures]
            axes.bar(x, ratios, 0.9 * width, label=name, color=COLORS[place % len(COLORS)])
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(
            range(len(figures)), [textwrap.fill(described(figure), 8, break_long_words=False) for figure in figures]
        )
        axes.set_ylabel("speed-up over dense")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=len(simulations), loc="lower left", bbox_to_anchor=(0, 1))
        drawing.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    typer.run(main)
