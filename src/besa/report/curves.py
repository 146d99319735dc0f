"""Curves with their spread over seeds, in panels side by side: how good models are against what was changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

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
        color: its place among the colours.
        x: where its points are, from left to right.
        y: their values; not finite leaves a gap.
        spread: of the values, drawn to both sides.
    """

    label: str
    color: int
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
        for left, width, panel in zip(accumulate(widths, initial=0), widths, panels, strict=False):
            right = 34 + CHARACTER * max(len(brief(curve.label)) for curve in panel.curves)
            _panel(drawing.axes(left + 62, 14, width - 62 - right, HEIGHT - 62), panel)
    return drawing.svg


def _panel(axes: Axes, panel: Panel) -> None:
    values = [value for curve in panel.curves for value in curve.y if math.isfinite(value)]
    shown = [*values, panel.reference[1]] if panel.reference else values
    if panel.log_x:
        axes.set_xscale("log", base=2)
    log = bool(shown) and min(shown) > 0 and spread(shown) > APART
    set_scale(axes, "y", log, 6)
    axes.margins(y=0.1)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    for curve in panel.curves:
        series = Series(curve.label, curve.color, curve.y)
        axes.errorbar(
            curve.x,
            curve.y,
            yerr=list(curve.spread) if any(curve.spread) else None,
            color=series.stand_in,
            linewidth=1.9,
            marker="o",
            markersize=4,
            capsize=3,
            linestyle="none" if panel.ticks else DASHES[curve.color // COLORS % len(DASHES)],
        )
        if panel.ticks:
            _name_values(axes, curve)
    if panel.reference:
        name, height = panel.reference
        below = height <= min(values, default=height)  # where no curve is
        axes.axhline(height, color=TEXT, linewidth=1, dashes=(4, 3))
        axes.annotate(
            name,
            (0, height),
            (3, -3 if below else 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="top" if below else "bottom",
        )
    places = sorted({x for curve in panel.curves for x in curve.x})
    if len(places) > TICKS:
        axes.xaxis.set_major_locator(MaxNLocator(TICKS, integer=True, steps=[1, 2, 5, 10]))
    else:
        axes.set_xticks(places, [tick.replace("-", "-\n").replace(" ", "\n") for tick in panel.ticks] or None)
    axes.minorticks_off()
    if not panel.ticks:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if len(panel.curves) > 1:
        axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # names are placed by what the limits end as
        name_ends(axes, [Series(curve.label, curve.color, curve.y) for curve in panel.curves], gap=14 / (HEIGHT - 62))


def _name_values(axes: Axes, curve: Curve) -> None:
    """Put the number above each point."""
    for x, y in zip(curve.x, curve.y, strict=True):
        if math.isfinite(y):
            axes.annotate(significant(y), (x, y), (0, 6), textcoords="offset points", ha="center")
