"""Figure 5 of the paper: the reconstruction error of every block by learning granularity; the runs are Table 6's.

    python -m experiments.all --only fig5

Errors are those of the run records: on sequences that the methods were calibrated on, half of their tokens.
"""

from experiments.experiment import ERRORS, Experiment, Found, by_block, errors, numbers
from experiments.judging import Verdict, ruled
from experiments.table6 import PAPER, falling, granularities


def verdict(found: Found) -> Verdict:
    """Errors fall from each granularity to the next coarser one."""
    told, steps = falling(found, ERRORS[1])
    return ruled(f"Mean over blocks: {numbers(found, PAPER, ERRORS[1], 4)}; {told}.", steps)


EXPERIMENT = Experiment(
    "fig5", "Figure 5: reconstruction error by granularity", granularities, verdict, by_block, texts=(), scores=errors
)
