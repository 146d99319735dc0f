"""Table 6 of the paper: what shares a budget and a loss, from single layers to two blocks.

    python -m experiments.table6 --model smollm2 --data wikitext2=FILE --data c4=FILE --data ptb=FILE

The paper's "layer" is Wanda. BESA's rates learned for each linear on its own output (`granularity=linear`) are one row
more.
"""

from itertools import pairwise

from experiments.experiment import DENSE_CASE, Case, Experiment, Found, Options, Verdict, by_method, numbers
from experiments.running import run

PAPER = ("layer (Wanda)", "attn-mlp", "block", "two-blocks")


def granularities(options: Options) -> list[Case]:
    """The paper's four, and BESA for each linear."""
    return [
        Case(PAPER[0], options.baseline("wanda")),
        Case("linear", options.besa("allocation.granularity=linear")),
        Case("attn-mlp", options.besa("allocation.granularity=attn-mlp")),
        Case("block", options.besa()),
        Case("two-blocks", options.besa("allocation.granularity=two-blocks")),
    ]


def cases(options: Options) -> list[Case]:
    """The dense model, and all granularities."""
    return [DENSE_CASE, *granularities(options)]


def verdict(found: Found) -> Verdict:
    """Perplexity falls from each granularity to the next coarser one."""
    holds = all(found.score(coarser) < found.score(finer) for finer, coarser in pairwise(PAPER))
    return Verdict(f"{found.text}: {numbers(found, PAPER)}; BESA for each linear: {found.score('linear'):,.2f}.", holds)


EXPERIMENT = Experiment("table6", "Table 6: learning granularity", cases, verdict, by_method)

if __name__ == "__main__":
    run(EXPERIMENT)
