"""What an evaluation found, as a model card shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """One number that an evaluation found.

    Attributes:
        name: of the text or the task.
        dataset: its id on the Hub, or a plain name.
        metric: ``perplexity``, ``acc`` or ``acc_norm``.
        value: the number.
        basis: what it was measured on, such as ``141 windows of 2048 tokens``.
        stderr: its standard error, if it is known.
        config: of the data set.
        split: of the data set.
    """

    name: str
    dataset: str
    metric: str
    value: float
    basis: str
    stderr: float | None = None
    config: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Measurements:
    """What an evaluation found.

    Attributes:
        rows: the numbers.
        version: of the besa that measured.
        date: when it did, in ISO 8601; empty if it is not known.
        notes: what a reader should know, a sentence each.
    """

    rows: Sequence[Measurement] = ()
    version: str = ""
    date: str = ""
    notes: Sequence[str] = ()


NOTHING = Measurements()
