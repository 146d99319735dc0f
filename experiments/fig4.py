"""Figure 4 of the paper: perplexity against the size of the calibration set, one epoch over each.

python -m experiments.fig4 --model smollm2 --data wikitext2=wikitext2.test.raw --points 4,16,64
"""

from collections.abc import Sequence
from dataclasses import replace

from besa.report.curves import Curve, Panel
from besa.studies.workspace import DENSE
from experiments.experiment import DENSE_CASE, Case, Experiment, Found, Options, Verdict, numbers
from experiments.running import run

ENOUGH = 64  # sequences beyond which the paper finds little more
LITTLE = 0.01  # change of perplexity that counts as little


def label(samples: float) -> str:
    """Of a case."""
    return f"{samples:g} sequences"


def cases(options: Options) -> list[Case]:
    """BESA with ever more sequences."""
    found = [DENSE_CASE]
    for point in options.points:
        own = replace(options, conditions=replace(options.conditions, samples=int(point)))
        found.append(Case(label(point), own.besa(), int(point)))
    return found


def panels(found: Found) -> Sequence[Panel]:
    """One curve."""
    labels = [label(point) for point in found.options.points]
    spread = [found.rows[one].spread.get(found.text, 0.0) for one in labels]
    curve = Curve("besa", 1, found.options.points, [found.score(one) for one in labels], spread)
    y_label = f"perplexity {found.text}"
    return [Panel([curve], "calibration sequences", y_label, (DENSE, found.score(DENSE)), log_x=True)]


def verdict(found: Found) -> Verdict:
    """More sequences help clearly up to 64, and little beyond."""
    few = [point for point in found.options.points if point <= ENOUGH]
    many = [point for point in found.options.points if point >= ENOUGH]
    first, enough, last = (found.score(label(point)) for point in (few[0], few[-1], found.options.points[-1]))
    said = f"{found.text}: {numbers(found, [label(point) for point in found.options.points])}."
    helps = len(few) > 1 and enough < (1 - LITTLE) * first
    if len(many) < 2:
        return Verdict(f"{said} More than {ENOUGH} were not tried.", helps)
    return Verdict(said, helps and abs(last / enough - 1) < LITTLE)


EXPERIMENT = Experiment(
    "fig4",
    "Figure 4: calibration size",
    cases,
    verdict,
    panels,
    texts=("wikitext2",),
    points=(2, 4, 8, 16, 32, 64, 128, 256),
)

if __name__ == "__main__":
    run(EXPERIMENT)
