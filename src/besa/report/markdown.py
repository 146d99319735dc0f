"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

ESCAPED = r"\|"  # a bar that ends no cell


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table in Markdown, with a line break at its end.

    Args:
        head: names of the columns.
        rows: the cells of each row, one for each column.
        words: how many of the first columns hold words, and are aligned to the left; the others hold numbers.
    """
    alignment = "|" + "---|" * words + "---:|" * (len(head) - words)
    return "\n".join([_line(head), alignment, *map(_line, rows)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', ESCAPED) for cell in cells)} |"
