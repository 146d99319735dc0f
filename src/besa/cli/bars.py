"""Progress as a bar that moves: in a terminal, and in a notebook."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TextIO

from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from besa.cli.consoles import err, removable
from besa.cli.reports import Follower, Report

WIDE = 24  # columns of a bar
ROOM = 80  # columns of a terminal from which there is a bar beside the numbers
PAUSE = 0.25  # seconds between two drawings of a bar in a notebook


@contextmanager
def terminal_bar() -> Iterator[Follower]:
    """A bar that follows one piece of work after another; it is gone at the end."""
    wide = [BarColumn(bar_width=WIDE), TimeElapsedColumn()] if err.width >= ROOM else []
    numbers = [TextColumn("{task.fields[count]}"), TextColumn("{task.fields[left]}")]
    bars = Bars(
        TextColumn("{task.percentage:>3.0f}%"),
        *wide,
        *numbers,
        _Note(),
        console=err,
        transient=True,
        redirect_stdout=_on_terminal(sys.stdout) and _on_terminal(sys.stderr),  # what is printed appears above the bar
    )
    task: TaskID | None = None

    def follow(report: Report) -> None:
        nonlocal task
        if task is None or report.begins:
            if task is not None:
                bars.remove_task(task)
            task = bars.add_task("", total=report.total, count="", left="", note="")
        left = f"left {report.remaining or '-:--:--'}"
        bars.update(task, completed=report.done, count=report.count, left=left, note=report.note)

    with bars, removable(bars.stop):
        yield follow


def _on_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


class _Note(ProgressColumn):
    """The note: what is cut where the terminal has no room for all."""

    def render(self, task: Task) -> Text:
        """Return the note of a task; rich calls this."""
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


class NotebookBar:
    """A bar of text below a notebook's cell, drawn again in its place. It needs nothing that a notebook lacks.

    Args:
        clock: seconds from any moment on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._at = clock, float("-inf")
        self._display: Any = import_module("IPython.display").display  # part of every notebook
        self._shown: Any = None

    def __call__(self, report: Report) -> None:
        """Draw the bar, unless it has just been drawn."""
        now = self._clock()
        if now - self._at < PAUSE and not report.begins and report.done < report.total:
            return
        self._at = now
        text = {"text/plain": drawn(report)}
        if self._shown is None:
            self._shown = self._display(text, raw=True, display_id=True)
        else:
            self._shown.update(text, raw=True)


def drawn(report: Report) -> str:
    """A bar as a line of text."""
    share = min(1.0, report.done / report.total) if report.total else 1.0
    full = round(WIDE * share)
    parts = [report.count, f"left {report.remaining}" if report.remaining else "", report.note]
    return f"{share:4.0%} |{'█' * full}{' ' * (WIDE - full)}| {', '.join(filter(None, parts))}"
