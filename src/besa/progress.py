"""How long work tells the outside how far it is, without printing anything itself."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Told now and then how far one piece of work is; the command line draws it, the default ignores it."""

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """`done` out of `total` units are through; `note` is a short phrase on the state of the work."""


def silent(done: float, total: float, note: str = "") -> None:
    """The progress that nobody watches."""


def labelled(progress: Progress, label: str) -> Progress:
    """Progress that says first what it is about."""

    def tell(done: float, total: float, note: str = "") -> None:
        progress(done, total, f"{label}: {note}")

    return tell
