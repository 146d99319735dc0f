"""Table 6 of the paper: what shares a budget and a loss, from single layers to two blocks.

    python -m experiments.all --only table6 --data wikitext2=FILE --data c4=FILE --data ptb=FILE

The paper's "layer" is Wanda. BESA's rates learned for each linear on its own output (`granularity=linear`) are one row
more.
"""

from itertools import pairwise

from besa.models.source import EMBEDDED
from experiments.experiment import DENSE_CASE, Case, Experiment, Found, Options, by_method, numbers
from experiments.judging import Judged, Verdict, judged, ruled

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


def falling(found: Found, score: str) -> tuple[str, list[Judged]]:
    """Whether a score falls from each of the paper's granularities to the next coarser one, in words and judged."""
    steps = [(f"{b} against {a}", judged(found.changes(b, a, score), most=0)) for a, b in pairwise(PAPER)]
    return ", ".join(f"{name} {one.words()}" for name, one in steps), [one for _, one in steps]


def verdict(found: Found) -> Verdict:
    """Perplexity falls from each granularity to the next coarser one."""
    told, steps = falling(found, found.text)
    said = f"{found.text}: {numbers(found, PAPER)}; BESA for each linear: {found.score('linear'):,.2f}"
    return ruled(f"{said}; {told}.", steps)


EXPERIMENT = Experiment(
    "table6",
    "Table 6: learning granularity",
    cases,
    verdict,
    by_method,
    models=(EMBEDDED, "qwen2.5-coder-1.5b"),
)
