"""Prune the first block of the demo's model as the demo does, with what is installed: the check of an environment."""

from __future__ import annotations

import sys
from contextlib import suppress

import besa


class FirstBlock(Exception):
    """The first block is pruned."""


def stop(done: float, total: float, note: str = "") -> None:
    """End the work after the first block."""
    if 1 <= done < total and note.startswith("error"):
        raise FirstBlock(note)


with suppress(FirstBlock):
    besa.compress("smollm2", "besa", samples=16, seqlen=512, sparsity=0.5, progress=stop)
    sys.exit("The first block did not end.")
