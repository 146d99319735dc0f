"""Recipes on five kinds of text that nothing was calibrated on, calibrated on a mixture: the tables by text.

python -m experiments.all --only domains --data wikitext2=FILE --data c4=FILE
"""

from besa.data.domains import DOMAINS
from besa.evaluation.domains import ALL
from besa.models.source import EMBEDDED
from experiments.experiment import DENSE_CASE, Case, Experiment, Found, Options, by_method, numbers
from experiments.judging import Verdict, judged, ruled
from experiments.settings import DEFAULTS

ORDER = ("wanda", "sparsegpt", "besa", "fast", "best")
OWN = ("besa", "fast", "best")


def cases(options: Options) -> list[Case]:
    """The dense model, and what `besa compare` would be asked for."""
    return [DENSE_CASE, *(Case(name, options.baseline(name)) for name in ORDER)]


def verdict(found: Found) -> Verdict:
    """Each recipe of besa's own is below all that are cheaper, in the mean of all domains."""
    steps = {
        f"{name} against {other}": judged(found.changes(name, other, ALL), most=0)
        for name in OWN
        for other in ORDER[: ORDER.index(name)]
    }
    said = f"Mean of the domains: dense {found.score('dense', ALL):,.2f}, {numbers(found, ORDER, ALL)}"
    told = ", ".join(f"{label} {one.words()}" for label, one in steps.items())
    return ruled(f"{said}; {told}.", list(steps.values()))


EXPERIMENT = Experiment(
    "domains",
    "Recipes by kind of text",
    cases,
    verdict,
    by_method,
    texts=(*DOMAINS, "wikitext2", "c4"),
    claim="That each recipe is below those before it",
    settings=(DEFAULTS,),
    models=(EMBEDDED, "gemma3-270m", "qwen2.5-coder-1.5b"),
    calibration="mix",
)
