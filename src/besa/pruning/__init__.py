"""Pruning: Algorithm 1 over the blocks (`loop`), one step of it (`step`), and the hidden states between (`paths`).

Before the blocks, whole experts may go (`dropping`). After them, the whole model may be distilled (`distilling`).
"""

from besa.pruning.dropping import drop_experts, smaller
from besa.pruning.loop import prune_blocks
from besa.pruning.model import prune_model
from besa.pruning.paths import Resources
from besa.pruning.run import Run

__all__ = ["Resources", "Run", "drop_experts", "prune_blocks", "prune_model", "smaller"]
