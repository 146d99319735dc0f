"""Figure 5 of the paper: the reconstruction error of every block by learning granularity; the runs are Table 6's.

    python -m experiments.fig5 --model smollm2

Errors are those of the run records: on sequences that the methods were calibrated on, half of their tokens.
"""

from itertools import pairwise

from experiments.experiment import ERRORS, Experiment, Found, Verdict, by_block, errors, numbers
from experiments.running import run
from experiments.table6 import PAPER, granularities


def verdict(found: Found) -> Verdict:
    """Errors fall from each granularity to the next coarser one."""
    holds = all(found.score(coarser, ERRORS[1]) < found.score(finer, ERRORS[1]) for finer, coarser in pairwise(PAPER))
    return Verdict(f"Mean over blocks: {numbers(found, PAPER, ERRORS[1], 4)}.", holds)


EXPERIMENT = Experiment(
    "fig5", "Figure 5: reconstruction error by granularity", granularities, verdict, by_block, texts=(), scores=errors
)

if __name__ == "__main__":
    run(EXPERIMENT)
