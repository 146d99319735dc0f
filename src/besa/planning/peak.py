"""The most memory that pruning one unit takes, by what its phases keep."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from besa.allocation import Allocation, first_tokens
from besa.allocation.besa import Besa
from besa.finetuning import MaskedAdam
from besa.masks import CHUNK
from besa.models.units import Unit
from besa.planning.shapes import forward_bytes
from besa.quantization import MinMax
from besa.recipe import Recipe
from besa.reconstruction import ADMM, ConjugateGradient
from besa.targets import LossSensitivity, Search

OPTIMIZER = 7  # copies of the logits: themselves, gradient, two moments, beta, its gradient, the tails


def unit_bytes(model: PreTrainedModel, unit: Unit, recipe: Recipe, batch: int, seqlen: int) -> int:
    """Peak while a unit is pruned: its weights, and the largest of what its phases add."""
    item = model.dtype.itemsize
    sizes = [prunable.numel for prunable in unit.prunables.values()]
    widest = max(prunable.columns for prunable in unit.prunables.values())
    weights, most = sum(sizes), max(sizes)
    stored = stored_bytes(unit)
    read = stored // len(unit.blocks)  # each tensor is copied out of its file before it becomes a parameter
    watched = batch * seqlen * widest * 8  # a product's input as float32, and its squares
    statistics = forward_bytes(unit, model, batch, seqlen, learning=False) + watched
    gram = 4 * sum(columns**2 for columns in {p.columns for p in unit.prunables.values()}) if recipe.needs_gram else 0
    ranked = 4 * weights + (2 if widest < 1 << 15 else 4) * weights  # importance and ranks, kept together
    whole = most if getattr(recipe.allocation, "per", "row") == "linear" else CHUNK  # weights sorted at once
    ranking = ranked + 12 * most + 32 * min(whole, most)
    phases = [read, statistics + gram, ranking + gram]
    if recipe.descent is not None:
        quantized = isinstance(recipe.quantization, MinMax)
        changing = item * (weights + most) + (2 * weights if model.dtype == torch.float32 else 0)  # a copy in bfloat16
        changing += item * weights + 16 * most if quantized else 0  # Q(W), and the slopes of its steps
        learning = forward_bytes(unit, model, 1, first_tokens(seqlen, recipe.descent.crop), learning=True)
        phases.append(ranked + changing + _rates_bytes(recipe.allocation, unit) + learning)
    if isinstance(recipe.quantization, MinMax):
        phases.append(ranked + weights + 16 * most)  # codes
    if recipe.reconstruction.needs_gram:
        solver = {ADMM: 44, ConjugateGradient: 32}.get(type(recipe.reconstruction), 12)  # copies of a weight, in bytes
        phases.append(ranked + gram + 4 * 4 * widest**2 + solver * most)
    if recipe.probed is not None or isinstance(recipe.targets, LossSensitivity | Search):
        phases.append(ranked + 12 * most + forward_bytes(unit, model, 1, seqlen, learning=True))
    if isinstance(recipe.targets, Search):  # ranks, and what a trial leaves of the weights
        phases.append(ranked + item * weights + forward_bytes(unit, model, batch, seqlen, learning=False))
    if isinstance(recipe.finetune, MaskedAdam):
        # Weights, gradient, two moments and the best so far as float32, the mask, copies to multiply with.
        tuned = (21 + item + 2) * weights
        phases.append(ranked + tuned + forward_bytes(unit, model, 1, seqlen, learning=True))
    phases.append(ranked + stored + 12 * most)  # the record and the journal
    return stored + max(phases)


def _rates_bytes(allocation: Allocation, unit: Unit) -> int:
    """Of what the coefficients of a unit take while they are learned."""
    if not isinstance(allocation, Besa):
        return 0
    rows = sum(prunable.rows for prunable in unit.prunables.values())
    groups = rows if allocation.rates == "row" else len(unit.prunables)
    return 4 * round(1 / allocation.candidate_step) * (OPTIMIZER * groups + rows)


def stored_bytes(unit: Unit) -> int:
    """Bytes of a unit's parameters."""
    return sum(parameter.nbytes for block in unit.blocks for parameter in block.module.parameters())
