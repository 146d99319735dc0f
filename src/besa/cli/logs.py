"""The log of each rank, when several work together: what its progress says, and how it ends."""

from __future__ import annotations

import time
import warnings
from datetime import datetime
from pathlib import Path
from typing import TextIO

from besa.cli.reports import Follower, Report
from besa.errors import Notice

FOLDER = Path("besa-logs")  # in the working folder
EVERY = 10.0  # seconds between two lines with the same note

_file: TextIO | None = None


def begin(number: int, title: str) -> None:
    """Write the log of this rank from now on; earlier runs stay in the file.

    Args:
        number: of the rank.
        title: first line of the run.
    """
    global _file
    try:
        FOLDER.mkdir(exist_ok=True)
        _file = (FOLDER / f"rank-{number}.log").open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        warnings.warn(f"No logs of the ranks are written to {FOLDER}: {error.strerror}.", Notice, stacklevel=2)
    write(title)


def write(text: str) -> None:
    """Add a line, or several, if this rank has a log. If the file cannot be written, the command goes on without."""
    global _file
    if _file is not None:
        try:
            _file.write(f"{datetime.now().isoformat(' ', 'seconds')} {text}\n")
        except OSError:
            _file = None


def follower() -> Follower:
    """What follows progress in the log: whenever the note changes, else every few seconds."""
    seen, at = "", -EVERY

    def follow(report: Report) -> None:
        nonlocal seen, at
        now = time.monotonic()
        if report.note != seen or now - at >= EVERY:
            seen, at = report.note, now
            write(f"{report.done:,.0f}/{report.total:,.0f} {report.note}".rstrip())

    return follow
