"""Pruning: Algorithm 1 over the blocks (`loop`), one step of it (`step`), and the hidden states between (`paths`)."""

from besa.pruning.loop import prune_blocks
from besa.pruning.paths import Resources

__all__ = ["Resources", "prune_blocks"]
