"""Memory and disk of distillation, for which all blocks are in memory at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from transformers import PreTrainedModel

from besa.checkpoint.writer import disk_bytes
from besa.errors import BesaError
from besa.methods.recipe import Recipe
from besa.methods.targets.budgets import budgets
from besa.models.blocks import Block
from besa.models.sizes import channels, vocabulary
from besa.models.whole import Whole
from besa.observing.prediction_loss import tokens_at_once
from besa.quantization import Coding
from besa.system import ranks
from besa.system.devices import shares_memory, total_bytes

ALIVE = 5  # tensors of the size of a chunk of logits


def whole_bytes(model: PreTrainedModel, blocks: list[Block], recipe: Recipe, seqlen: int) -> int:
    """Bytes while a model is distilled, without what the pass through a block keeps for its gradients; 0 if it is not.

    Args:
        model: in the dtype of the run; its weights may be on the meta device.
        blocks: of the model.
        recipe: the method.
        seqlen: tokens of a calibration sequence.
    """
    if not recipe.distill.moves_weights:
        return 0
    parameters: int = sum(parameter.nbytes for parameter in model.parameters())
    states = (len(blocks) + 2) * seqlen * channels(model) * int(model.dtype.itemsize)
    logits = ALIVE * 4 * vocabulary(model) * min(seqlen, tokens_at_once(vocabulary(model)))
    kept, vectors = _sizes(model, blocks, recipe)
    rounded = 4 * kept if recipe.rounds_last else 0
    return parameters + recipe.distill.learning_bytes(kept, vectors) + rounded + states + logits


def whole_disk_bytes(model: PreTrainedModel, blocks: list[Block], recipe: Recipe, size: int) -> int:
    """Most bytes on the disk during a run, for a checkpoint of `size` bytes.

    While a state is written, the one before it is there. The distilled blocks are beside those from which they came,
    which are not codes yet. Other arguments as of `whole_bytes`.
    """
    if not recipe.distill.moves_weights:
        return disk_bytes(size)
    kept, vectors = _sizes(model, blocks, recipe)
    state = recipe.distill.state_bytes(kept, vectors, model.dtype.itemsize)
    begun = sum(parameter.nbytes for parameter in model.parameters()) if recipe.rounds_last else size
    return begun + max(2 * state, disk_bytes(size))


def coded_bytes(size: int, item: int, blocks: Sequence[Block], pruned: Collection[str], coding: Coding) -> int:
    """Bytes of a checkpoint of `size` bytes whose pruned linears become codes, with scales and zero points.

    Args:
        size: of the dense checkpoint.
        item: bytes of a number of it.
        blocks: of the model.
        pruned: full names of the linears that are pruned.
        coding: of the recipe.
    """
    weights = bits = 0
    for name, prunable in ((name, one) for block in blocks for name, one in block.prunables.items() if name in pruned):
        grids = prunable.rows * coding.groups(name, prunable.columns)
        weights += prunable.numel
        bits += coding.bits * (prunable.numel + grids) + 8 * item * grids
    return size - item * weights + bits // 8


def check_fits(model: PreTrainedModel, blocks: list[Block], recipe: Recipe, seqlen: int, device: torch.device) -> None:
    """Check before the work that a model can be distilled here; arguments as of `whole_bytes`.

    Raises:
        BesaError: the device has too little memory.
    """
    needed = whole_bytes(model, blocks, recipe, seqlen)
    there = total_bytes(device) // (ranks.here() if shares_memory(device) else 1)
    if needed > there:
        raise BesaError(
            f"Distilling has the whole model in memory and needs {needed / 1e9:.2f} GB, but {device.type} has "
            f"{there / 1e9:.2f} GB for each rank: set distill.learns=norms, which needs less, or distill.method=none."
        )


def _sizes(model: PreTrainedModel, blocks: list[Block], recipe: Recipe) -> tuple[int, int]:
    """The number of weights that stay of the pruned linears, and of elements of norms and biases."""
    kept = sum(budget.weights - budget.zeros for of_unit in budgets(blocks, recipe) for budget in of_unit)
    vectors: int = sum(model.get_parameter(name).numel() for name in Whole(model, blocks).vectors)
    return kept, vectors
