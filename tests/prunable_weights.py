"""How many weights of a block can be pruned."""

from besa.models.blocks import Block


def prunable_weights(block: Block) -> int:
    """The number of weights in the prunable matrices of a block."""
    return sum(prunable.numel for prunable in block.prunables.values())
