"""How the progress of long work is shown: a bar, plain lines, JSON, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from besa.cli import logs
from besa.cli.bars import NotebookBar, terminal_bar
from besa.cli.consoles import err
from besa.cli.events import events
from besa.cli.lines import Lines
from besa.cli.reports import Follower, Reporter
from besa.progress import Progress
from besa.system import ranks


@contextmanager
def show_progress(*, quiet: bool = False, json_progress: str | Path | None = None) -> Iterator[Progress]:
    """While open, the progress that it gives is shown on standard error.

    In a terminal and in a notebook it is a bar that moves. Elsewhere it is plain lines: one for each block, and of what
    has no blocks at most one a minute. Of several ranks, the first shows it, and each has its log.

    Args:
        quiet: show nothing.
        json_progress: file to which progress is added as JSON, one object a line.

    Raises:
        BesaError: that file cannot be written.
    """
    with ExitStack() as stack:
        followers: list[Follower] = [logs.follower()]
        if ranks.is_first():
            if json_progress is not None:
                followers.append(stack.enter_context(events(json_progress)))
            if not quiet:
                followers.append(_shown(stack))
        yield Reporter(followers)


def _shown(stack: ExitStack) -> Follower:
    if err.is_jupyter:
        return NotebookBar()
    return stack.enter_context(terminal_bar()) if err.is_interactive else Lines()
