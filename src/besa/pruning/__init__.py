"""Pruning: Algorithm 1 over the blocks (`loop`), one step of it (`step`), and what flows on to the next (`paths`)."""

from besa.pruning.loop import prune_blocks
from besa.pruning.paths import Resources

__all__ = ["Resources", "prune_blocks"]
