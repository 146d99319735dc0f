"""Progress of long work, reported to a callback; nothing is printed here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """A callback that long work calls from time to time. The command line draws it; the default ignores it."""

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """`done` of `total` units are done; `note` is a short phrase on the state of the work."""


@dataclass(frozen=True)
class BlockDone:
    """A block that is pruned.

    Attributes:
        name: full name of the block.
        error: of its output, relative to the dense model's.
        sparsity: of its prunable weights.
        seconds: that pruning it took, in the run that did it.
        restored: whether it was taken from the journal of an interrupted run.
        run: which of several runs; empty if there is one only.
    """

    name: str
    error: float
    sparsity: float
    seconds: float
    restored: bool = False
    run: str = ""


class BlockNote(str):
    """The note on a block that is done: a phrase like any other, which also has the numbers it tells of.

    Args:
        block: that is done.
    """

    block: BlockDone

    def __new__(cls, block: BlockDone) -> Self:
        """The phrase, and the block."""
        state = f"error {block.error:.4f}, sparsity {block.sparsity:.2%}"
        if block.restored:
            state += ", taken from the journal"
        note = super().__new__(cls, f"{block.run}: {state}" if block.run else state)
        note.block = block
        return note


def silent(done: float, total: float, note: str = "") -> None:
    """Progress that is ignored."""


def labelled(progress: Progress, label: str) -> Progress:
    """Progress whose notes begin with a label."""

    def report(done: float, total: float, note: str = "") -> None:
        if isinstance(note, BlockNote):
            progress(done, total, BlockNote(replace(note.block, run=label)))
        else:
            progress(done, total, f"{label}: {note}")

    return report
