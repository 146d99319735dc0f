"""Figure 3 of the paper: perplexity against the sparsity of the model.

python -m experiments.fig3 --model smollm2 --data wikitext2=wikitext2.test.raw --points 0.3,0.5,0.6,0.7
"""

from experiments.experiment import DENSE_CASE, Case, Experiment, Found, Options, Verdict, at, by_sparsity, numbers
from experiments.running import run

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
    points = found.options.points
    lowest = [
        point
        for point in points
        if found.score(at("besa", point)) < min(found.score(at(name, point)) for name in BASELINES)
    ]
    ends = "; ".join(
        numbers(found, [at(name, point) for name in (*BASELINES, "besa")]) for point in (points[0], points[-1])
    )
    return Verdict(
        f"BESA is the lowest at {len(lowest)} of {len(points)} sparsities; {ends}.", len(lowest) == len(points)
    )


EXPERIMENT = Experiment(
    "fig3",
    "Figure 3: model sparsity",
    cases,
    verdict,
    by_sparsity,
    texts=("wikitext2",),
    points=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
)

if __name__ == "__main__":
    run(EXPERIMENT)
