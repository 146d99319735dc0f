"""Progress as a file of JSON, one object a line, for programs that watch a run (docs/formats.md)."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from besa.cli.reports import Follower, Report
from besa.errors import BesaError, Interrupted, Notice
from besa.storage.names import path_of
from besa.version import __version__

EVERY = 10.0  # seconds between two lines on the same piece of work, blocks aside


@contextmanager
def events(file: str | Path) -> Iterator[Follower]:
    """Add the progress of a run to a file: its beginning, each report that is due, and its end.

    Args:
        file: is made if it does not exist; what is in it stays.

    Raises:
        BesaError: the file cannot be written.
    """
    path = path_of(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+b", buffering=0)
        log = Events(opened)
    except OSError as error:
        raise BesaError(f"{file} cannot be written: {error.strerror}.") from error
    with opened:
        log.write("begin", command=sys.argv, besa=__version__)
        try:
            yield log
        except BaseException as error:
            log.write("end", error=_reason(error))
            raise
        log.write("end", error=None)


class Events:
    """Progress as lines of JSON.

    Args:
        file: open for reading and appending, without a buffer, so that each line is written at once and whole.
        clock: seconds from any moment on.
    """

    def __init__(self, file: BinaryIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._file: BinaryIO | None = file
        self._clock, self._at = clock, clock()
        if file.seek(0, 2) and file.seek(-1, 2) and file.read(1) != b"\n":  # a run was killed in the middle of a line
            file.write(b"\n")

    def __call__(self, report: Report) -> None:
        """Write a report, if it is the first or the last of a piece of work, on a block, or due."""
        now = self._clock()
        turns = report.block is not None or report.begins or report.done >= report.total
        if not turns and now - self._at < EVERY:
            return
        self._at = now
        where = {
            "done": report.done,
            "total": report.total,
            "note": report.note,
            "left": report.left and round(report.left, 1),
        }
        if report.block is None:
            self.write("progress", **where)
        else:
            numbers = asdict(report.block)
            self.write("block", **where, **numbers | {"error": _number(report.block.error)})

    def write(self, event: str, **fields: Any) -> None:
        """Write an event with its time. If the file cannot be written any more, the work goes on without."""
        if self._file is None:
            return
        moment = datetime.now(UTC).isoformat(timespec="milliseconds")
        text = json.dumps({"event": event, "time": moment, **fields}, ensure_ascii=False, allow_nan=False)
        try:
            self._file.write(f"{text}\n".encode())
        except OSError as error:
            self._file = None
            warnings.warn(f"No more progress is written as JSON: {error.strerror}.", Notice, stacklevel=2)


def _number(value: float | None) -> float | None:
    """A number that JSON knows."""
    return value if value is not None and math.isfinite(value) else None


def _reason(error: BaseException) -> str:
    """Why a run ended."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(error) if isinstance(error, (BesaError, Interrupted)) else f"{type(error).__name__}: {error}"
