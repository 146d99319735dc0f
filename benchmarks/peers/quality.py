"""Quality against bytes and against speed, of models that were measured: a table, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

from besa.report.markdown import table as markdown
from besa.report.plots import Series, set_scale
from besa.report.svg import MUTED, Drawing, standalone

WIDTH, HEIGHT = 470, 300  # of a panel
NEAR = 0.2, 0.04  # shares of width and height of a panel, within which names would lie on each other
COLOURS = {"besa": 0, "llama.cpp": 1}  # places among those of the style sheet


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown; the models are sorted by the bytes of their files."""
    measured = "perplexity" in found[0]
    head = ["model", "by", "file, MB", *(["perplexity"] if measured else []), "decode, tokens/s", "prompt, tokens/s"]
    rows = [
        [
            one["form"],
            one["maker"],
            f"{one['file_bytes'] / 1e6:,.1f}",
            *([f"{one['perplexity']:.2f}"] if measured else []),
            f"{one['decode']['middle']:,.1f}",
            f"{one['prompt']['middle']:,.1f}",
        ]
        for one in sorted(found, key=lambda one: -one["file_bytes"])
    ]
    return markdown(head, rows, words=2)


def plot(found: Sequence[dict[str, Any]]) -> str:
    """Perplexity against megabytes and against tokens a second of decoding, as an SVG document."""
    panels = [
        ("file, MB", [one["file_bytes"] / 1e6 for one in found]),
        ("decoding, tokens a second", [one["decode"]["middle"] for one in found]),
    ]
    with Drawing("Perplexity against bytes and against speed", 2 * WIDTH, HEIGHT) as drawing:
        for place, (label, values) in enumerate(panels):
            axes = drawing.axes(place * WIDTH + 56, 14, WIDTH - 56 - 90, HEIGHT - 62)
            set_scale(axes, "x", log=False, ticks=6)
            set_scale(axes, "y", log=True, ticks=6)
            lines = _lines([x / max(values) for x in values], [one["perplexity"] for one in found])
            for one, x, line in zip(found, values, lines, strict=True):
                text = f"{one['maker']}, {one['form']}"
                axes.plot([x], [one["perplexity"]], "o", color=Series(text, COLOURS[one["maker"]], ()).stand_in)
                axes.annotate(text, (x, one["perplexity"]), (6, 4 - 11 * line), textcoords="offset points", color=MUTED)
            axes.set_xlim(0, 1.05 * max(values))
            axes.set_xlabel(label)
            axes.set_ylabel("perplexity" if place == 0 else "")
            axes.grid(axis="y")
            axes.set_axisbelow(True)
    return standalone(drawing.svg)


def _lines(shares: Sequence[float], perplexities: Sequence[float]) -> list[int]:
    """How many lines below its usual place the name of each point stands: as many as names before it would lie there.

    Args:
        shares: of the width, where the points are.
        perplexities: on a logarithmic scale, where they are.
    """
    height = log(max(perplexities) / min(perplexities)) or 1.0
    points = [(share, log(perplexity) / height) for share, perplexity in zip(shares, perplexities, strict=True)]
    return [
        sum(abs(x - other) < NEAR[0] and abs(y - below) < NEAR[1] for other, below in points[:place])
        for place, (x, y) in enumerate(points)
    ]
