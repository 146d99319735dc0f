"""Algorithm 1: prune a decoder block by block, each block learning from the ones before it.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, O rows, I columns.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import PreTrainedModel

from besa.allocation import Allocated, BlockProblem, RankedLinear
from besa.budget import split, zeros_for
from besa.calibration import Calibration
from besa.errors import BesaError
from besa.losses import reconstruction_error
from besa.masks import rank
from besa.models.blocks import Block, capture_inputs, find_blocks
from besa.progress import Progress, silent
from besa.recipe import Recipe
from besa.record import BlockRecord, linear_record
from besa.statistics import InputStatistics, collect

ERROR_SHARE = 8  # the error against the dense path is measured on one sequence in so many, the same for every method


def prune_blocks(
    model: PreTrainedModel,
    recipe: Recipe,
    calibration: Calibration,
    *,
    seed: int = 0,
    batch: int = 4,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> list[BlockRecord]:
    """Prune `model` in place by `recipe`, one block on `device` at a time, and tell what was done to each block.

    Args:
        model: causal decoder in evaluation mode, on the CPU.
        recipe: the method.
        calibration: token ids (N, T).
        seed: of whatever the allocation draws.
        batch: sequences in a forward pass.
        device: where blocks are computed; by default where the model is.
        progress: told (blocks done, blocks, state) after every block.

    Raises:
        BesaError: no blocks are found, activations are not finite, or a block's zeros exceed its budget already.
    """
    home = model.device
    device = device or home
    blocks = find_blocks(model)
    sizes = [block.weights for block in blocks]
    budgets = split(zeros_for(recipe.sparsity, sum(sizes)), sizes)
    pruned_NTC = capture_inputs(model, blocks, calibration.tokens_NT, batch)  # line 1
    dense_share = 1 if recipe.allocation.teacher == "dense" else ERROR_SHARE
    dense_NTC = pruned_NTC[::dense_share]
    records: list[BlockRecord] = []
    progress(0, len(blocks), "first block")
    for block, zeros in zip(blocks, budgets, strict=True):  # line 2
        began = time.perf_counter()
        block.module.to(device)
        dense_NTC = block.run(dense_NTC, batch)  # line 3
        with collect(block.linears, recipe.needs_gram) as statistics:
            own_NTC = block.run(pruned_NTC, batch)
        _check_finite(own_NTC, block)
        linears = _ranked(block, recipe, statistics)  # line 4
        targets_NTC = dense_NTC if recipe.allocation.teacher == "dense" else own_NTC
        problem = BlockProblem(block, linears, pruned_NTC, targets_NTC, zeros, seed + block.index)
        allocated = recipe.allocation.allocate(problem)  # lines 5 to 10
        _rebuild(block, linears, allocated, recipe, statistics)  # line 12
        pruned_NTC = block.run(pruned_NTC, batch)  # line 11
        error = reconstruction_error(pruned_NTC[::ERROR_SHARE], dense_NTC[:: ERROR_SHARE // dense_share])
        records.append(_record(block, linears, allocated, float(error), time.perf_counter() - began))
        block.module.to(home)
        progress(len(records), len(blocks), f"error {error:.4f}, sparsity {records[-1].sparsity:.2%}")
    return records


def _check_finite(y_NTC: Tensor, block: Block) -> None:
    if not bool(y_NTC.isfinite().all()):
        raise BesaError(
            f"{block.name} puts out NaN or infinity: try --dtype float32, and check the model with `besa eval`."
        )


def _ranked(block: Block, recipe: Recipe, statistics: dict[str, InputStatistics]) -> dict[str, RankedLinear]:
    """The weights of the block in the order in which the recipe prunes them (eq. 2)."""
    linears = {}
    for name, linear in block.linears.items():
        w_OI = linear.weight.detach().clone()
        importance_OI = recipe.importance.score(w_OI, statistics[name])
        linears[name] = RankedLinear(w_OI, importance_OI, rank(importance_OI, w_OI))
    return linears


@torch.no_grad()
def _rebuild(
    block: Block,
    linears: dict[str, RankedLinear],
    allocated: Allocated,
    recipe: Recipe,
    statistics: dict[str, InputStatistics],
) -> None:
    """Write the pruned weights into the block."""
    for name, linear in linears.items():
        counts_O = allocated.counts[name].to(linear.w_OI.device)
        w_OI = recipe.reconstruction.rebuild(linear.w_OI, linear.ranks_OI, counts_O, statistics[name])
        block.linears[name].weight.copy_(w_OI)


def _record(
    block: Block, linears: dict[str, RankedLinear], allocated: Allocated, error: float, seconds: float
) -> BlockRecord:
    """What was done to the block, counted in its weights as they are now."""
    parts = [
        linear_record(name, block.linears[name].weight.detach(), linear.importance_OI)
        for name, linear in linears.items()
    ]
    zeros = sum(part.zeros for part in parts)
    return BlockRecord(
        index=block.index,
        name=block.name,
        weights=block.weights,
        zeros=zeros,
        sparsity=zeros / block.weights,
        reconstruction_error=error,
        losses=allocated.losses,
        seconds=seconds,
        linears=parts,
    )
