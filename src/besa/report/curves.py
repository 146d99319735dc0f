"""Curves with their spread over seeds, in panels side by side: how good models are against what was changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from besa.report.plots import APART, CHARACTER, COLORS, DASHES, Series, brief, name_ends, set_scale, spread
from besa.report.svg import TEXT, Drawing
from besa.report.wording import significant

WIDTH, HEIGHT = 480, 320  # of a panel, pixels; where it has many names below, it is wider
NAME = 68  # pixels for each of these
TICKS = 12  # at most, on the axis below


@dataclass(frozen=True)
class Curve:
    """One line.

    Attributes:
        label: its name.
        color: its place among the colours, None for muted.
        x: where its points are, from left to right.
        y: their values; not finite leaves a gap.
        spread: of the values, drawn to both sides.
    """

    label: str
    color: int | None
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """Curves in one pair of axes.

    Attributes:
        curves: what is drawn.
        x_label: of the axis below.
        y_label: of the axis to the left.
        reference: name and height of a dashed line.
        ticks: names for places of x, where it is no quantity; points are not joined then.
        log_x: places of x are powers, such as of two.
    """

    curves: Sequence[Curve]
    x_label: str
    y_label: str
    reference: tuple[str, float] | None = None
    ticks: Sequence[str] = field(default=())
    log_x: bool = False


def curves(title: str, panels: Sequence[Panel]) -> Markup:
    """Panels from left to right; a scale is logarithmic where values of one lie far apart."""
    widths = [max(WIDTH, 62 + 34 + NAME * len(panel.ticks)) for panel in panels]
    with Drawing(title, sum(widths), HEIGHT) as drawing:
        for start, width, panel in zip(accumulate(widths, initial=0), widths, panels, strict=False):
            highest = max((value for curve in panel.curves for value in curve.y if math.isfinite(value)), default=0)
            left = max(62, 34 + CHARACTER * len(f"{highest:,.0f}"))
            right = 34 + CHARACTER * max(len(brief(curve.label)) for curve in panel.curves)
            _panel(drawing.axes(start + left, 14, width - left - right, HEIGHT - 62), panel)
    return drawing.svg


def _panel(axes: Axes, panel: Panel) -> None:
    values = [value for curve in panel.curves for value in curve.y if math.isfinite(value)]
    places = sorted({x for curve in panel.curves for x in curve.x})
    _scale(axes, panel, values)
    for curve in panel.curves:
        _draw(axes, panel, curve)
    if panel.reference:
        _refer(axes, *panel.reference, values)
    _tick(axes, panel, places)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if len(panel.curves) > 1:
        _name(axes, panel, places)


def _scale(axes: Axes, panel: Panel, values: list[float]) -> None:
    shown = [*values, panel.reference[1]] if panel.reference else values
    if panel.log_x:
        axes.set_xscale("log", base=2)
    log = bool(shown) and min(shown) > 0 and spread(shown) > APART
    set_scale(axes, "y", log, 6)
    axes.margins(y=0.1)
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _draw(axes: Axes, panel: Panel, curve: Curve) -> None:
    """A line with its spread; without a line, and with its values, where places are names."""
    axes.errorbar(
        curve.x,
        curve.y,
        yerr=list(curve.spread) if any(curve.spread) else None,
        color=Series(curve.label, curve.color, curve.y).stand_in,
        linewidth=1.9,
        marker="o",
        markersize=4,
        capsize=3,
        linestyle="none" if panel.ticks else DASHES[(curve.color or 0) // COLORS % len(DASHES)],
    )
    if panel.ticks:
        _name_values(axes, curve)


def _refer(axes: Axes, name: str, height: float, values: list[float]) -> None:
    """A line at the height of the reference, named where no curve is."""
    below = height <= min(values, default=height)
    axes.axhline(height, color=TEXT, linewidth=1, dashes=(4, 3))
    axes.annotate(
        name,
        (0, height),
        (3, -3 if below else 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="top" if below else "bottom",
    )


def _tick(axes: Axes, panel: Panel, places: list[float]) -> None:
    """Marks at all places, or at some of them where they are many."""
    if panel.log_x and any(after / before < math.sqrt(2) for before, after in pairwise(places)):
        axes.xaxis.set_major_locator(LogLocator(2))
    elif len(places) > TICKS:
        axes.xaxis.set_major_locator(MaxNLocator(TICKS, integer=True, steps=[1, 2, 5, 10]))
    else:
        axes.set_xticks(places, [tick.replace("-", "-\n").replace(" ", "\n") for tick in panel.ticks] or None)
    axes.minorticks_off()
    if not panel.ticks:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _name(axes: Axes, panel: Panel, places: list[float]) -> None:
    """The name of each curve at its end, or at its only point."""
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # names are placed by what the limits end as
    alone = [curve for curve in panel.curves if len(curve.x) == 1 < len(places) and not panel.ticks]
    for curve in alone:
        _name_point(axes, curve)
    ends = [Series(curve.label, curve.color, curve.y) for curve in panel.curves if curve not in alone]
    name_ends(axes, ends, gap=14 / (HEIGHT - 62))


def _name_point(axes: Axes, curve: Curve) -> None:
    """Put the name beside its only point, or above it where the axes end soon."""
    point = (curve.x[0], curve.y[0])
    far = (axes.transData + axes.transAxes.inverted()).transform(point)[0] > 0.5
    axes.annotate(
        brief(curve.label),
        point,
        (0, 7) if far else (6, 3),
        textcoords="offset points",
        ha="center" if far else "left",
        color=Series(curve.label, curve.color, curve.y).stand_in,
    )


def _name_values(axes: Axes, curve: Curve) -> None:
    """Put the number above each point."""
    for x, y in zip(curve.x, curve.y, strict=True):
        if math.isfinite(y):
            axes.annotate(significant(y), (x, y), (0, 6), textcoords="offset points", ha="center")
