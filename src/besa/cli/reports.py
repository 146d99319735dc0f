"""Progress as those who show it receive it: which piece of work it is about, and how long that will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from besa.progress import BlockDone, BlockNote


@dataclass(frozen=True)
class Report:
    """Where a piece of work stands.

    Attributes:
        done: units that are done.
        total: units of this piece of work.
        note: a short phrase on its state.
        block: that is just done, if it is one.
        begins: whether this is the first report on another piece of work.
        left: seconds that the rest of it will take; None before that is known.
    """

    done: float
    total: float
    note: str
    block: BlockDone | None
    begins: bool
    left: float | None

    @property
    def count(self) -> str:
        """What is done of how much; large numbers are bytes."""
        if self.total < 1e6:
            return f"{self.done:,.0f}/{self.total:,.0f}"
        return f"{self.done / 1e6:,.1f}/{self.total / 1e6:,.1f} MB"

    @property
    def remaining(self) -> str:
        """The time left, as hours, minutes and seconds; empty if it is not known."""
        return "" if self.left is None else str(timedelta(seconds=round(self.left)))


Follower = Callable[[Report], None]


class Reporter:
    """Progress that makes a report of what it is told and passes it on.

    A new total, or less done than before, is another piece of work. Blocks that come from a journal take hardly any
    time, so they do not count for the time left.

    Args:
        followers: receive each report.
        clock: seconds from any moment on.
    """

    def __init__(self, followers: Sequence[Follower], clock: Callable[[], float] = time.monotonic) -> None:
        self._followers, self._clock = followers, clock
        self._done = self._total = -1.0
        self._at = self._spent = self._worked = 0.0

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """See `Progress`."""
        now, block = self._clock(), note.block if isinstance(note, BlockNote) else None
        begins = total != self._total or done < self._done
        if begins:
            self._spent = self._worked = 0.0
        elif done > self._done and not (block is not None and block.restored):
            self._spent += now - self._at
            self._worked += done - self._done
        self._at, self._done, self._total = now, done, total
        left = self._spent / self._worked * (total - done) if self._worked else None
        report = Report(done, total, note, block, begins, left)
        for follow in self._followers:
            follow(report)
