"""Figure 4 of the paper: perplexity against the size of the calibration set, one epoch over each.

python -m experiments.all --only fig4 --data wikitext2=wikitext2.test.raw
"""

from collections.abc import Sequence
from dataclasses import replace

from besa.report.curves import Curve, Panel
from besa.studies.workspace import DENSE
from experiments.experiment import DENSE_CASE, Case, Experiment, Found, Options, numbers
from experiments.judging import UNTRIED, Verdict, judged, ruled

ENOUGH = 64  # sequences beyond which the paper finds little more
LITTLE = 1.0  # per cent of perplexity that count as little


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
    said = f"{found.text}: {numbers(found, [label(point) for point in found.options.points])}"
    helps = judged(found.changes(label(few[-1]), label(few[0])), most=-LITTLE) if len(few) > 1 else UNTRIED
    beyond = judged(found.changes(label(many[-1]), label(many[0])), -LITTLE, LITTLE) if len(many) > 1 else UNTRIED
    told = ", ".join(
        f"from {own[0]:g} to {own[-1]:g} {one.words()}"
        for own, one in ((few, helps), (many, beyond))
        if one is not UNTRIED
    )
    return ruled(f"{said}; {told or f'nothing on both sides of {ENOUGH} was tried'}.", [helps, beyond])


EXPERIMENT = Experiment(
    "fig4",
    "Figure 4: calibration size",
    cases,
    verdict,
    panels,
    texts=("wikitext2",),
    points=(2, 4, 8, 16, 32, 64, 128, 256),
)
