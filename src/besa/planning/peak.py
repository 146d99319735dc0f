"""Peak memory while one unit is pruned: that of the phase that needs most."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from besa.counting.masks import CHUNK
from besa.methods.recipe import Recipe
from besa.models.units import Unit
from besa.planning.shapes import forward_bytes


def unit_bytes(
    model: PreTrainedModel, unit: Unit, inputs: Sequence[tuple[str, ...]], recipe: Recipe, batch: int, seqlen: int
) -> int:
    """Peak bytes while a unit is pruned: its weights, plus the most that a phase adds.

    Args:
        model: a skeleton on the meta device, in the dtype of the run.
        unit: of the model.
        inputs: names of its matrices, grouped by the input that they share.
        recipe: the method.
        batch: sequences in a forward pass.
        seqlen: tokens of a sequence.
    """
    item = model.dtype.itemsize
    sizes = [prunable.numel for prunable in unit.prunables.values()]
    widest = max(prunable.columns for prunable in unit.prunables.values())
    weights, most = sum(sizes), max(sizes)
    stored = stored_bytes(unit)
    read = stored // len(unit.blocks)  # each tensor is copied from its file before it becomes a parameter
    observed = batch * seqlen * widest * 8  # the input of a product as float32, and its squares
    statistics = forward_bytes(unit, model, batch, seqlen, learning=False) + observed
    # Float32 Gram matrices of all inputs, each with a second one of the held-out tokens.
    gram = 8 * sum(unit.prunables[names[0]].columns ** 2 for names in inputs) if recipe.needs_gram else 0
    summing = 2 * gram + (4 * widest**2 if gram else 0)  # in float64, and what one pass adds
    ranked = 4 * weights + (2 if widest < 1 << 15 else 4) * weights  # importance and ranks, kept together
    whole = most if recipe.allocation.sorts_linears else CHUNK  # weights sorted at once
    ranking = ranked + 12 * most + 32 * min(whole, most)
    coded = recipe.quantization.coding is not None
    phases = [read, statistics + summing, ranking + gram]
    if recipe.descent is not None:
        shapes = [(prunable.rows, prunable.columns) for prunable in unit.prunables.values()]
        changing = item * (weights + most) + (2 * weights if model.dtype == torch.float32 else 0)  # a copy in bfloat16
        changing += item * weights + 16 * most if coded else 0  # Q(W), and the slopes of its steps
        learning = forward_bytes(unit, model, 1, recipe.descent.tokens(seqlen), learning=True)
        phases.append(ranked + changing + recipe.allocation.learning_bytes(shapes) + learning)
    if coded:
        codes = weights * (1 if recipe.quantization.moved is None else 1 + item)  # and what was rounded
        matrices = gram + 4 * 4 * widest**2 if recipe.quantization.needs_gram else 0
        phases.append(ranked + codes + matrices + recipe.quantization.solver_bytes * most)
    if recipe.reconstruction.needs_gram:
        phases.append(ranked + gram + 4 * 4 * widest**2 + recipe.reconstruction.solver_bytes * most)
    if recipe.losses_every(1):
        phases.append(ranked + 12 * most + forward_bytes(unit, model, 1, seqlen, learning=True))
    if recipe.targeting.trials:  # ranks, and the pruned weights of a trial
        phases.append(ranked + item * weights + forward_bytes(unit, model, batch, seqlen, learning=False))
    if recipe.finetune.moves_weights:
        tuned = recipe.finetune.bytes_per_weight(item) * weights
        phases.append(ranked + tuned + forward_bytes(unit, model, 1, seqlen, learning=True))
    phases.append(ranked + stored + 12 * most)  # the record and the journal
    return stored + max(phases)


def learning_bytes(model: PreTrainedModel, unit: Unit, kept: int, seqlen: int) -> int:
    """Bytes that a unit adds where the whole model learns: copies to multiply and its backward pass, or its state.

    Args:
        model: a skeleton on the meta device, in the dtype of the run.
        unit: of the model.
        kept: weights that stay of its pruned linears.
        seqlen: tokens of a sequence.
    """
    weights = sum(prunable.numel for prunable in unit.prunables.values())
    item: int = model.dtype.itemsize
    passed = forward_bytes(unit, model, 1, seqlen, learning=True) + 2 * item * weights
    return max(passed, 2 * (12 + item) * kept)


def stored_bytes(unit: Unit) -> int:
    """Bytes of a unit's parameters."""
    return sum(parameter.nbytes for block in unit.blocks for parameter in block.module.parameters())
