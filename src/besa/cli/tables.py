"""Tables in a terminal that show every name and number whole, however narrow the terminal is."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

WIDE = 1 << 16  # columns: more than any table takes
INDENT, GAP = "  ", "  "


class Whole(Table):
    """A table of rich that shortens nothing; for a console with `soft_wrap`.

    Where the terminal has no room for a row, each row becomes lines of its own: first the cells of the columns on the
    left that are words, then the others with the names of their columns, in places that are the same for all rows. A
    table that holds nothing but words wraps them. Where there is no terminal, the table is as wide as it needs.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield what rich prints; rich calls this."""
        if self.title:
            yield _line(console.render_str(str(self.title), style="table.title"))
        bare = copy(self)
        bare.title = bare.caption = None
        for column in bare.columns:
            column.overflow = "fold"
        needed = Measurement.get(console, options.update(width=WIDE), bare).maximum
        if needed <= options.max_width or not console.is_terminal:
            yield from Table.__rich_console__(bare, console, options.update(width=needed))
        elif self._words == len(self.columns):
            yield from Table.__rich_console__(bare, console, options)
        else:
            yield from self._rows(console, options.max_width)
        if self.caption:
            caption = console.render_str(str(self.caption), style="table.caption")
            caption.no_wrap, caption.overflow = not console.is_terminal, "ignore"
            yield caption

    @property
    def _words(self) -> int:
        """The number of columns on the left that hold words."""
        return next((n for n, column in enumerate(self.columns) if column.justify != "left"), len(self.columns))

    def _rows(self, console: Console, width: int) -> Iterator[Text]:
        """Each row as lines."""
        columns = [[console.render_str(str(cell)) for cell in column.cells] for column in self.columns]
        names = [str(column.header) for column in self.columns]
        room = [
            len(name) + 1 + max(cell.cell_len for cell in cells) for name, cells in zip(names, columns, strict=True)
        ]
        for row in zip(*columns, strict=True):
            words, numbers = row[: self._words], row[self._words :]
            title = Text(", ").join(cell for cell in words if cell.plain.strip())
            title.stylize("bold")
            yield _line(title)
            line = Text(INDENT)
            for name, cell, place in zip(names[self._words :], numbers, room[self._words :], strict=True):
                if len(line) > len(INDENT) and line.cell_len + place > width:
                    yield from [_line(line)] if line.plain.strip() else []
                    line = Text(INDENT)
                pair = Text.assemble((f"{name} ", "dim"), cell) if cell.plain else Text()
                line.append_text(pair).append(" " * (place - pair.cell_len) + GAP)
            yield from [_line(line)] if line.plain.strip() else []


def _line(text: Text) -> Text:
    """Text of one line, which a terminal breaks if it must."""
    text.rstrip()
    text.no_wrap, text.overflow = True, "ignore"
    return text
