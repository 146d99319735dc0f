"""Progress of long work, reported to a callback; nothing is printed here."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """A callback that long work calls from time to time. The command line draws it; the default ignores it."""

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """`done` of `total` units are done; `note` is a short phrase on the state of the work."""


def silent(done: float, total: float, note: str = "") -> None:
    """Progress that is ignored."""


def labelled(progress: Progress, label: str) -> Progress:
    """Progress whose notes begin with a label."""

    def report(done: float, total: float, note: str = "") -> None:
        progress(done, total, f"{label}: {note}")

    return report
