"""The front page's table: recipes as they ship, at 50 and at 70 %.

python -m experiments.all --only front --data wikitext2=FILE
"""

from experiments.experiment import DENSE_CASE, Case, Experiment, Found, Options, at, by_method, numbers
from experiments.judging import Verdict, judged, ruled
from experiments.settings import DEFAULTS

METHODS = {
    0.5: ("magnitude", "wanda", "sparsegpt", "besa-layerwise", "besa", "fast", "best"),
    0.7: ("wanda", "sparsegpt", "besa", "fast"),
}
BASELINES = ("wanda", "sparsegpt")


def cases(options: Options) -> list[Case]:
    """All methods at both sparsities."""
    by_name = [(name, sparsity) for sparsity, names in METHODS.items() for name in names]
    return [DENSE_CASE, *(Case(at(name, sparsity), options.baseline(name, sparsity)) for name, sparsity in by_name)]


def verdict(found: Found) -> Verdict:
    """BESA is below Wanda and SparseGPT at both."""
    against = {
        at(other, sparsity): judged(found.changes(at("besa", sparsity), at(other, sparsity)), most=0)
        for sparsity in METHODS
        for other in BASELINES
    }
    told = ", ".join(f"{label} {one.words()}" for label, one in against.items())
    said = numbers(found, [at("besa", sparsity) for sparsity in METHODS])
    return ruled(f"{found.text}: {said}; against {told}.", list(against.values()))


EXPERIMENT = Experiment(
    "front",
    "Recipes at 50 and 70 %",
    cases,
    verdict,
    by_method,
    texts=("wikitext2",),
    claim="That BESA is below Wanda and SparseGPT",
    settings=(DEFAULTS,),
    calibration="mix",
)
