"""Pruning: Algorithm 1 over the blocks (`loop`), one step of it (`step`), and the hidden states between (`paths`).

After the blocks, the whole model may be distilled (`distilling`).
"""

from besa.pruning.loop import prune_blocks
from besa.pruning.model import prune_model
from besa.pruning.paths import Resources

__all__ = ["Resources", "prune_blocks", "prune_model"]
