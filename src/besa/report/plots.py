"""The plots of a report: bars, lines, heat maps and histograms, each a pure function from numbers to inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from besa.report.svg import HIGH, LOW, MUTED, TEXT, Drawing
from besa.report.wording import MINUS, percent, significant

COLORS = 8  # --s0 to --s7 in style.css
DASHES: list[Any] = ["-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2))]  # one after another when colours run out
CHARACTER = 6.4  # width of one, about
APART = 3.0  # ratio between lines beyond which a logarithmic scale shows them better
WIDE, HALF, THIRD = 960, 470, 306


@dataclass(frozen=True)
class Series:
    """One line or bar.

    Attributes:
        label: its name.
        color: its place among the colours, None for muted.
        values: what is drawn; not finite leaves a gap.
        faint: whether it only accompanies another.
    """

    label: str
    color: int | None
    values: Sequence[float]
    faint: bool = False

    @property
    def stand_in(self) -> str:
        """The colour to draw with."""
        return MUTED if self.color is None else f"#0200{self.color % COLORS:02x}"


def bars(
    title: str,
    items: Sequence[Series],
    texts: Sequence[str],
    reference: tuple[str, float] | None = None,
    log: bool = False,
) -> Markup:
    """Horizontal bars labelled with `texts`, from zero, or on a logarithmic scale from the reference."""
    values = [item.values[0] for item in items]
    shown = [v for v in [*values, *([reference[1]] if reference else [])] if math.isfinite(v) and v > 0]
    low, high = min(shown, default=1.0), max(shown, default=1.0)
    base = (reference[1] if reference else low / 1.5) if log else 0.0
    left, top = 14 + CHARACTER * max(len(brief(item.label)) for item in items), 46.0 if reference else 28.0
    with Drawing(title, HALF, top + 22 * len(items) + 26) as drawing:
        axes = drawing.axes(left, top, HALF - left - 12, 22.0 * len(items))
        set_scale(axes, "x", log, 5)
        axes.set_xlim(low / 1.3 if log else 0, high * (high / low) ** 0.28 if log else high * 1.22)
        for place, (item, value, text) in enumerate(zip(items, values, texts, strict=True)):
            end = base
            if math.isfinite(value):
                axes.barh(place, value - base, left=base, height=0.62, color=item.stand_in, linewidth=0)
                end = max(value, base)
            axes.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center")
            drawing.tell((0, place - 0.5), (1, place + 0.5), axes.get_yaxis_transform(), f"{item.label}\n{text}")
        if reference:
            axes.axvline(reference[1], color=TEXT, linewidth=1, dashes=(4, 3))
            axes.annotate(
                reference[0], (reference[1], 1), (-1, 4), xycoords=("data", "axes fraction"), textcoords="offset points"
            )
        axes.set_yticks(range(len(items)), [brief(item.label) for item in items])
        axes.set_ylim(len(items) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0, labelcolor=TEXT)
        axes.spines["left"].set_visible(not log)
        drawing.heading(title)
    return drawing.svg


def lines(
    title: str,
    x: Sequence[int],
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    size: tuple[int, int],
    notes: Sequence[str] = (),
) -> Markup:
    """Lines over a shared x, each named at its right end; log scale if whole lines lie far apart.

    The pointer is told the values at each x, and what `notes` says of it.
    """
    positive = [[value for value in line.values if math.isfinite(value) and value > 0] for line in series]
    middles = [sorted(values)[len(values) // 2] for values in positive if values]
    left, right = 62, 30 + CHARACTER * max(len(brief(line.label)) for line in series)
    with Drawing(title, *size) as drawing:
        axes = drawing.axes(left, 10, size[0] - left - right, size[1] - 54)
        log = spread(middles) > APART
        set_scale(axes, "y", log, 6)
        if not log:
            axes.set_ylim(0, 1.06 * max(map(max, filter(None, positive)), default=1.0))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        for line in series:
            (drawn,) = axes.plot(x, line.values, color=line.stand_in, linewidth=0.9 if line.faint else 1.9)
            drawn.set_alpha(0.6 if line.faint else 1)
            drawn.set_linestyle(DASHES[(line.color or 0) // COLORS % len(DASHES)])
            drawn.set_marker("o" if len(x) == 1 else "")
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        margin = 0.01 * (max(x) - min(x) or 1)
        axes.set_xlim(min(x) - margin, max(x) + margin)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        name_ends(axes, series, gap=14 / (size[1] - 54))
        edges = [min(x) - margin, *((before + after) / 2 for before, after in pairwise(x)), max(x) + margin]
        for i, (start, end) in enumerate(pairwise(edges)):
            values = [
                f"{line.label}: {significant(line.values[i])}" for line in series if math.isfinite(line.values[i])
            ]
            told = "\n".join([f"{x_label} {x[i]}", *values, *notes[i : i + 1]])
            drawing.tell((start, 0), (end, 1), axes.get_xaxis_transform(), told)
    return drawing.svg


def name_ends(axes: Axes, series: Sequence[Series], gap: float) -> None:
    """Name each line beside its end; where names would overlap, push them apart to `gap` (of the height)."""
    to_share = axes.transData + axes.transAxes.inverted()
    named = []
    for line in series:
        end = next((value for value in reversed(line.values) if math.isfinite(value)), None)
        if end is not None:
            named.append((float(to_share.transform((0, end))[1]), line))
    named.sort(key=lambda item: item[0])
    places = [share for share, _ in named]
    for i, (below, _) in enumerate(pairwise(range(len(places)))):
        places[i + 1] = max(places[i + 1], places[below] + gap)
    ceiling = 1.0
    for i in reversed(range(len(places))):  # what was pushed out at the top pushes back down
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - gap
    for place, (share, line) in zip(places, named, strict=True):
        leader = Line2D([1.003, 1.022], [share, place], color=line.stand_in, linewidth=0.8, clip_on=False)
        leader.set_transform(axes.transAxes)
        axes.add_artist(leader)
        axes.text(1.027, place, brief(line.label), transform=axes.transAxes, va="center", color=line.stand_in)


def heat_map(
    title: str,
    rows: Mapping[str, str],
    columns: Sequence[int],
    cells: Mapping[tuple[str, int], tuple[float, str]],
    limit: float,
) -> Markup:
    """Coloured cells.

    Args:
        title: for those who hear the page.
        rows: names of the rows, with the text that ends each.
        columns: indices of the columns.
        cells: by row and column, the deviation in [-limit, limit] that gives the colour, and what the pointer is told.
        limit: deviation of the strongest colour; no deviation is the colour of the page.
    """
    left, right, height = 14 + int(CHARACTER * max(map(len, rows))), 62, 20 * len(rows)
    cell = min(34, max(4, (WIDE - left - right) // len(columns)))  # whole pixels: crisp edges
    width = cell * len(columns)
    with Drawing(title, left + width + right, height + 58) as drawing:
        axes = drawing.axes(left, 20, width, height)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        x, y = {column: i - 0.5 for i, column in enumerate(columns)}, {row: i - 0.5 for i, row in enumerate(rows)}
        for (row, column), (deviation, tip) in cells.items():
            corner = (x[column], y[row])
            drawing.tip(_tint(axes, corner, deviation / limit), tip)
        every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if cell * step >= 24)
        axes.set_xticks(range(0, len(columns), every), [str(index) for index in columns[::every]])
        axes.set_yticks(range(len(rows)), list(rows))
        axes.tick_params(length=0)
        axes.tick_params(axis="y", labelcolor=TEXT)
        axes.spines[:].set_visible(True)
        axes.set_xlabel("block")
        axes.text(1 + 8 / width, 1 + 5 / height, "all", transform=axes.transAxes, color=MUTED)
        for i, text in enumerate(rows.values()):
            axes.text(1 + 8 / width, 1 - (i + 0.5) / len(rows), text, transform=axes.transAxes, va="center")
    return drawing.svg


def color_scale(limit: float) -> Markup:
    """The key to the colours of heat maps."""
    points = f"{100 * limit:g} points"
    with Drawing(f"Colours from {points} below to {points} above the sparsity of the run", 380, 40) as drawing:
        axes = drawing.axes(40, 2, 300, 12)
        axes.set_xlim(0, 40)
        axes.set_ylim(1, 0)
        for step in range(40):
            _tint(axes, (step, 0), (step - 19.5) / 19.5)
        axes.set_xticks([0, 20, 40], [MINUS + points, "sparsity of the run", "+" + points])
        axes.tick_params(length=0)
        axes.set_yticks([])
        axes.spines[:].set_visible(True)
    return drawing.svg


def _tint(axes: Axes, corner: tuple[float, float], strength: float) -> Rectangle:
    """A unit square: blue below, orange above, transparent in the middle."""
    color = (HIGH if strength > 0 else LOW, min(1.0, abs(strength)))
    square = Rectangle(corner, 1, 1, facecolor=color, linewidth=0, antialiased=False)
    axes.add_patch(square)
    return square


def histogram(
    title: str, series: Sequence[Series], limits: tuple[float, float], top: float, targets: Sequence[float]
) -> Markup:
    """Outlined histograms of equal bins over [0, 1], the asked sparsities as dashed lines."""
    with Drawing(title, THIRD, 150) as drawing:
        axes = drawing.axes(40, 28, THIRD - 40 - 24, 94)
        for line in series:
            edges = [i / len(line.values) for i in range(len(line.values) + 1)]
            axes.stairs(line.values, edges, color=(line.stand_in, 0.18 / len(series)), fill=True, linewidth=0)
            axes.stairs(line.values, edges, color=line.stand_in, linewidth=1.4)
        for target in targets:
            axes.axvline(target, color=TEXT, linewidth=1, dashes=(4, 3))
        axes.set_xlim(*limits)
        axes.set_ylim(0, top)
        for axis, ticks in ((axes.xaxis, 5), (axes.yaxis, 3)):
            axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10]))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
        bins = len(series[0].values)
        for i in range(round(limits[0] * bins), round(limits[1] * bins)):
            told = [f"{line.label}: {percent(line.values[i], 1)} of the rows" for line in series]
            rates = f"{percent(i / bins, 0)} to {percent((i + 1) / bins, 0)}"
            text = "\n".join([f"rate {rates}", *told])
            drawing.tell((i / bins, 0), ((i + 1) / bins, 1), axes.get_xaxis_transform(), text)
        drawing.heading(title.partition(":")[0])
    return drawing.svg


def spread(values: Sequence[float]) -> float:
    """Largest over smallest positive value."""
    known = [value for value in values if math.isfinite(value) and value > 0]
    return max(known) / min(known) if known else 1.0


def brief(label: str) -> str:
    """A label short enough for a plot."""
    return label if len(label) <= 28 else label[:27] + "…"


def set_scale(axes: Axes, direction: Literal["x", "y"], log: bool, ticks: int) -> None:
    """Linear or logarithmic, with round numbers written out."""
    if log:
        axes.set(**{f"{direction}scale": "log"})
    axis = axes.xaxis if direction == "x" else axes.yaxis
    if log:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        axis.set_minor_formatter(NullFormatter())
        axis.set_tick_params(which="minor", length=0)
    else:
        axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
