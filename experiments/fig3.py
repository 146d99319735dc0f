"""Figure 3 of the paper: perplexity against the sparsity of the model.

python -m experiments.all --only fig3 --data wikitext2=wikitext2.test.raw
"""

from experiments.experiment import DENSE_CASE, Case, Experiment, Found, Options, at, by_sparsity
from experiments.judging import Judged, Verdict, judged, ruled, together

BASELINES = ("sparsegpt", "wanda")


def cases(options: Options) -> list[Case]:
    """Three methods at every sparsity."""
    return [
        DENSE_CASE,
        *(Case(at(name, point), options.baseline(name, point)) for name in BASELINES for point in options.points),
        *(Case(at("besa", point), options.besa(sparsity=point)) for point in options.points),
    ]


def verdict(found: Found) -> Verdict:
    """BESA is the lowest at every sparsity."""
    points, said, lowest = found.options.points, [], 0
    all_of: list[Judged] = []
    for point in points:
        against = {name: judged(found.changes(at("besa", point), at(name, point)), most=0) for name in BASELINES}
        lowest += together(one.points for one in against.values()) is True
        all_of += against.values()
        told = ", ".join(f"{name} {one.words()}" for name, one in against.items())
        said.append(f"at {100 * point:g} % {found.score(at('besa', point)):,.2f}, against {told}")
    return ruled(f"BESA's mean is the lowest at {lowest} of {len(points)} sparsities: {'; '.join(said)}.", all_of)


EXPERIMENT = Experiment(
    "fig3",
    "Figure 3: model sparsity",
    cases,
    verdict,
    by_sparsity,
    texts=("wikitext2",),
    points=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
)
