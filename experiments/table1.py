"""Table 1 of the paper: perplexity of pruned models on WikiText-2, C4 and PTB.

python -m experiments.all --only table1 --data wikitext2=FILE --data c4=FILE --data ptb=FILE
"""

from besa.models.source import EMBEDDED
from experiments.experiment import DENSE_CASE, Case, Experiment, Found, Options, by_method, numbers
from experiments.judging import Judged, Verdict, judged, ruled
from experiments.settings import DEFAULTS, PAPER, RELEASED

METHODS = ("magnitude", "sparsegpt", "wanda", "besa-layerwise", "besa")
BASELINES = ("sparsegpt", "wanda")


def cases(options: Options) -> list[Case]:
    """All methods at one sparsity."""
    learned = {name: options.besa(name=name) for name in METHODS if name.startswith("besa")}
    return [DENSE_CASE, *(Case(name, learned.get(name) or options.baseline(name)) for name in METHODS)]


def verdict(found: Found) -> Verdict:
    """BESA is below SparseGPT and Wanda on every text."""
    said: list[str] = []
    all_of: list[Judged] = []
    for text in found.drawn:
        against = {other: judged(found.changes("besa", other, text), most=0) for other in BASELINES}
        told = ", ".join(f"{other} {one.words()}" for other, one in against.items())
        said.append(f"{text}: {numbers(found, METHODS[1:], text)}, besa against {told}")
        all_of += against.values()
    return ruled(f"{'; '.join(said)}.", all_of)


EXPERIMENT = Experiment(
    "table1",
    "Table 1: perplexity at one sparsity",
    cases,
    verdict,
    by_method,
    settings=(PAPER, RELEASED, DEFAULTS),
    models=(EMBEDDED, "qwen2.5-coder-1.5b"),
)
