"""How methods that were compared look in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from besa.cli.tables import Whole
from besa.studies.comparing import NAME
from besa.studies.rows import MADE_BY, PAIRED, listed, listed_pairs

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType

    from besa.studies.comparing import Comparison
    from besa.studies.demo import Demo


def demonstrated(result: Demo) -> RenderableType:
    """The methods of a demo side by side, and where its checkpoints are."""
    places = [f"Pruned by {method}: {folder}" for method, folder in result.checkpoints.items()]
    return Group(_compared(result.comparison), Text("\n".join([*places, f"Report: {result.page}"])))


def compared(result: Comparison, folder: Path) -> RenderableType:
    """Recipes side by side, and where their table and plot are."""
    files = ", ".join(str(folder / f"{NAME}{ending}") for ending in (".md", ".svg"))
    return Group(_compared(result), Text(f"Table and plot: {files}"))


def _compared(result: Comparison) -> RenderableType:
    table = Whole(title=result.model, caption=result.basis)
    head, *cells = listed([result.dense, *result.rows], result.earlier)
    for column in head:
        table.add_column(column, justify="left" if column in (head[0], MADE_BY) else "right")
    for line in cells:
        table.add_row(*line)
    notes, pairs = [Text(note) for note in result.footnotes], listed_pairs(result.rows)
    if not pairs:
        return Group(table, *notes)
    paired = Whole(caption=PAIRED)
    for column in pairs[0]:
        paired.add_column(column, justify="left" if column == pairs[0][0] else "right")
    for line in pairs[1:]:
        paired.add_row(*line)
    return Group(table, paired, *notes)
