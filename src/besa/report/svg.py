"""Inline SVG: matplotlib's drawing as part of an HTML page, light or dark.

Matplotlib draws with stand-in colours, which become CSS variables in the end. The viewBox is in CSS pixels.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Transform

TEXT, MUTED, RULE, LOW, HIGH = "#010101", "#010102", "#010103", "#010104", "#010105"
STAND_INS = {TEXT: "currentColor", MUTED: "var(--muted)", RULE: "var(--rule)", LOW: "var(--low)", HIGH: "var(--high)"}
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
FONT = 11.0
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "text.parse_math": False,  # names are not formulas
    "text.usetex": False,
    "font.family": ["DejaVu Sans"],
    "font.size": FONT,
    "text.color": TEXT,
    "axes.edgecolor": RULE,
    "axes.labelcolor": TEXT,
    "axes.labelsize": FONT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": FONT,
    "ytick.labelsize": FONT,
}

PAGE = {  # of style.css, for drawings that stand by themselves
    "text": "#1d1d1b", "muted": "#62625d", "rule": "#d9d8d2", "low": "#0072b2", "high": "#d55e00",
    "s0": "#0072b2", "s1": "#c14d00", "s2": "#00795a", "s3": "#a8518a", "s4": "#8a6400", "s5": "#147d8c",
    "s6": "#55534d", "s7": "#7a3fb5",
}  # fmt: skip


def standalone(drawing: Markup) -> str:
    """A drawing as an SVG document of its own, on a white page and of its own size."""
    text = re.sub(r"var\(--(\w+)\)", lambda match: PAGE[match[1]], str(drawing))
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    root = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    text = re.sub('style="[^"]*"', f'style="color: {PAGE["text"]}; background: #ffffff"', text, count=1)
    return text.replace("<svg ", root, 1) + "\n"


class Drawing:
    """A figure of a size in pixels; `svg` once the `with` block that draws on it has ended."""

    svg: Markup

    def __init__(self, title: str, width: float, height: float) -> None:
        self.title, self.width, self.height = title, width, height
        self.tips: dict[str, str] = {}
        self.parts: list[tuple[tuple[float, float], tuple[float, float], Transform, str]] = []
        # Whatever style the user has set elsewhere stays out; the salt makes ids differ between drawings of a page.
        style = {key: value for key, value in matplotlib.rcParamsDefault.items() if "backend" not in key}
        self.context = matplotlib.rc_context({**style, **SETTINGS, "svg.hashsalt": f"{title} {width}"})

    def __enter__(self) -> Drawing:
        self.context.__enter__()
        self.figure = Figure(figsize=(self.width / 72, self.height / 72), facecolor="none")
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        try:
            if kind is None:
                self.svg = self._finished()
        finally:
            self.context.__exit__(None, None, None)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes at a place given in pixels from the top left."""
        bottom = self.height - top - height
        place = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(place, facecolor="none")

    def heading(self, text: str) -> None:
        """A line of text at the top left."""
        self.figure.text(0, 1 - 4 / self.height, text, va="top", weight="bold")

    def tip(self, shape: Artist, text: str) -> None:
        """Show `text` when the pointer is on `shape`."""
        name = f"tip-{len(self.tips)}"
        shape.set_gid(name)
        self.tips[name] = text

    def tell(self, corner: tuple[float, float], opposite: tuple[float, float], transform: Transform, text: str) -> None:
        """Show `text` when the pointer is in a rectangle, by two corners in the coordinates of `transform`."""
        self.parts.append((corner, opposite, transform, text))

    def _finished(self) -> Markup:
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # the reader's browser has the fonts, not this machine
            self.figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        root = ElementTree.fromstring(buffer.getvalue())
        self._fit_for_html(root)
        root.extend(self._told())
        text = ElementTree.tostring(root, encoding="unicode")
        for stand_in, color in STAND_INS.items():
            text = text.replace(stand_in, color)
        return Markup(re.sub(r"#0200(0\d)", lambda match: f"var(--s{int(match[1])})", text))

    def _told(self) -> Iterator[ElementTree.Element]:
        """A rectangle without paint for each part that `tell` was given."""
        for corner, opposite, transform, text in self.parts:
            shares = (transform + self.figure.transFigure.inverted()).transform([corner, opposite])
            (left, right), (bottom, top) = sorted(shares[:, 0] * self.width), sorted(shares[:, 1] * self.height)
            place = {"x": left, "y": self.height - top, "width": right - left, "height": top - bottom}
            part = ElementTree.Element("rect", {"class": "tip", **{name: f"{at:.2f}" for name, at in place.items()}})
            ElementTree.SubElement(part, "title").text = text
            yield part

    def _fit_for_html(self, root: ElementTree.Element) -> None:
        """Drop what belongs to a document of its own: name spaces, style, metadata, ids that nothing refers to."""
        for parent in list(root.iter()):
            for child in list(parent):
                if child.tag in (f"{SVG}metadata", f"{SVG}style"):
                    parent.remove(child)
        for element in root.iter():
            element.tag = element.tag.removeprefix(SVG)
            element.attrib = {name.removeprefix(XLINK): value for name, value in element.attrib.items()}
            if element.get("id") in self.tips:
                ElementTree.SubElement(element, "title").text = self.tips[element.attrib["id"]]
                element.attrib["class"] = "tip"
            if element.tag == "g":
                element.attrib.pop("id", None)
        size = f"width: {self.width:.0f}px; min-width: {0.74 * self.width:.0f}px"  # narrower, text is not legible
        root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": self.title, "style": size}
