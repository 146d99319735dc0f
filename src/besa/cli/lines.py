"""Progress as plain lines, for a log: where standard error is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime

from besa.cli.consoles import err
from besa.cli.reports import Report

EVERY = 60.0  # seconds without a line before one on work that has no blocks


class Lines:
    """A line for each block, as soon as it is done. What has no blocks gets one a minute, at most.

    A command that takes less than a minute, and prunes nothing, prints none.

    Args:
        clock: seconds from any moment on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._at = clock, clock()

    def __call__(self, report: Report) -> None:
        """Print a line, if it is time for one."""
        now = self._clock()
        if report.block is None and now - self._at < EVERY:
            return
        self._at = now
        moment = datetime.now().isoformat(" ", "seconds")
        if not err.quiet:  # not by rich: after a Ctrl-C within its print, the next one has the line again
            err.file.write(f"besa: {moment} {line(report)}\n")
            err.file.flush()


def line(report: Report) -> str:
    """What a line says."""
    left = f", {report.remaining} left" if report.remaining and report.done < report.total else ""
    block = report.block
    if block is None:
        return f"{report.count} {report.note}".rstrip() + left
    run = f"{block.run}: " if block.run else ""
    took = "taken from the journal" if block.restored else f"{block.seconds:,.1f} s"
    return (
        f"{run}block {report.count}, {block.name}: error {block.error:.4f}, sparsity {block.sparsity:.2%}, {took}{left}"
    )
