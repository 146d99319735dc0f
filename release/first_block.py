"""Prune the first block of the demo's model as the demo does, with what is installed: the check of an environment."""

from __future__ import annotations

import sys

import besa


def stop(done: float, total: float, note: str = "") -> None:
    """End the program after the first block."""
    if done >= 1 and note.startswith("error"):
        print(f"The first block is pruned: {note}.")
        sys.exit()


besa.compress("smollm2", "besa", samples=16, seqlen=512, sparsity=0.5, progress=stop)
sys.exit("The first block did not end.")
