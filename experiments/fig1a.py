"""Figure 1a of the paper: how pruning errors add up over the blocks, layer by layer and with BESA.

    python -m experiments.fig1a --model smollm2

Errors are those of the run records: on sequences that the methods were calibrated on, half of their tokens.
"""

from experiments.experiment import ERRORS, Case, Experiment, Found, Options, Verdict, by_block, errors, numbers
from experiments.running import run


def cases(options: Options) -> list[Case]:
    """Wanda and BESA."""
    return [Case("wanda", options.baseline("wanda")), Case("besa", options.besa())]


def verdict(found: Found) -> Verdict:
    """BESA's error is below Wanda's in every block, and the gap grows."""
    wanda, besa = (by_block(found)[0].curves[place].y for place in (0, 1))
    below = sum(ours < theirs for ours, theirs in zip(besa, wanda, strict=True))
    grows = wanda[-1] - besa[-1] > wanda[0] - besa[0]
    last = numbers(found, ("wanda", "besa"), ERRORS[-1], 4)
    said = f"Below Wanda's in {below} of {len(wanda)} blocks; in the last, {last}."
    return Verdict(said, below == len(wanda) and grows)


EXPERIMENT = Experiment("fig1a", "Figure 1a: error accumulation", cases, verdict, by_block, texts=(), scores=errors)

if __name__ == "__main__":
    run(EXPERIMENT)
