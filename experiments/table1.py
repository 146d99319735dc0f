"""Table 1 of the paper: perplexity of pruned models on WikiText-2, C4 and PTB.

python -m experiments.table1 --model smollm2 --data wikitext2=FILE --data c4=FILE --data ptb=FILE
"""

from experiments.experiment import DENSE_CASE, Case, Experiment, Found, Options, Verdict, by_method, numbers
from experiments.running import run

METHODS = ("magnitude", "sparsegpt", "wanda", "besa-layerwise", "besa")


def cases(options: Options) -> list[Case]:
    """All methods at one sparsity."""
    learned = {name: options.besa(name=name) for name in METHODS if name.startswith("besa")}
    return [DENSE_CASE, *(Case(name, learned.get(name) or options.baseline(name)) for name in METHODS)]


def verdict(found: Found) -> Verdict:
    """BESA is below SparseGPT and Wanda on every text, and row-wise below layer-wise."""
    said = "; ".join(f"{score}: {numbers(found, METHODS[1:], score)}" for score in found.drawn)
    holds = all(
        found.score("besa", score) < min(found.score(other, score) for other in METHODS[1:-1]) for score in found.drawn
    )
    return Verdict(f"{said}.", holds)


EXPERIMENT = Experiment("table1", "Table 1: perplexity at one sparsity", cases, verdict, by_method)

if __name__ == "__main__":
    run(EXPERIMENT)
