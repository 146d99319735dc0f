"""Figure 1b of the paper: perplexity against the sparsity of one kind of layer, all others left dense.

python -m experiments.all --only fig1b --data wikitext2=wikitext2.test.raw
"""

from besa.models.kinds import kind, shortened
from besa.studies.workspace import DENSE
from experiments.experiment import (
    DENSE_CASE,
    Case,
    Experiment,
    Found,
    Options,
    at,
    by_sparsity,
    linear_names,
    numbers,
)
from experiments.judging import Verdict, judged, ruled
from experiments.settings import DEFAULTS

UNEQUAL = 2.0  # ratio between the damage of two kinds from which they count as unequal


def cases(options: Options) -> list[Case]:
    """Wanda on one kind of linear at a time."""
    names = linear_names(options.conditions.model)
    kinds = list(dict.fromkeys(kind(name, block) for block, own in names.items() for name in own))
    found = [DENSE_CASE]
    for short, path in zip(shortened(kinds), kinds, strict=True):
        others = tuple(f"*.{other}" for other in kinds if other != path)
        for point in options.points:
            recipe = options.baseline("wanda", point).with_exceptions(others, ())
            found.append(Case(at(short, point), recipe))
    return found


def verdict(found: Found) -> Verdict:
    """Kinds do not contribute equally: at the highest sparsity, one does several times the damage of another."""
    highest = max(found.options.points)
    labels = [label for label in found.rows if label.endswith(at("", highest))]
    (dense,) = found.values(DENSE)
    by_seed = zip(*(found.values(label) for label in labels), strict=True)
    damage = [[value - dense for value in own] for own in by_seed]
    apart = judged([max(own) - UNEQUAL * min(own) for own in damage], least=0)
    said = f"{found.text}, dense {dense:,.2f}: {numbers(found, labels)}"
    return ruled(f"{said}; the most damage less {UNEQUAL:g} times the least {apart.words('')}.", [apart])


EXPERIMENT = Experiment(
    "fig1b",
    "Figure 1b: sparsity of one kind of layer",
    cases,
    verdict,
    by_sparsity,
    texts=("wikitext2",),
    points=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    settings=(DEFAULTS,),
)
