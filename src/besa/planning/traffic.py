"""Bytes that a rank sends to others while a unit is pruned, as `ranks.sent` counts them.

Sums go round a ring: of R ranks, each sends 2(R − 1)/R of their bytes. So do rows: each rank sends R − 1 times the
bytes of the longest part. Small objects in JSON are left out: names, numbers of tokens, losses of held-out sequences,
and digests of weights.

Shape suffixes: O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from besa.counting.budget import Budget
from besa.methods.recipe import Recipe
from besa.models.units import Unit, parts

WIDE = 8  # bytes of a number in a sum: float64, or half of it on devices that have none
NARROW = torch.iinfo(torch.int16).max  # columns up to which ranks are int16


def traffic(
    unit: Unit,
    inputs: Sequence[tuple[str, ...]],
    budgets: Sequence[Budget],
    recipe: Recipe,
    samples: int,
    channels: int,
    ranks: int,
) -> dict[str, int]:
    """Bytes by phase of the run, if all steps are taken and every expert is reached.

    Args:
        unit: on the meta device, in the dtype of the run.
        inputs: names of its matrices, grouped by the input that they share.
        budgets: of the unit.
        recipe: the method.
        samples: calibration sequences of all ranks.
        channels: of the residual stream.
        ranks: R.
    """
    item = next(unit.blocks[0].module.parameters()).dtype.itemsize
    shapes = {name: (prunable.rows, prunable.columns) for name, prunable in unit.prunables.items()}
    pruned = [shapes[name] for budget in budgets for name in budget.names]
    kept = sum(budget.weights - budget.zeros for budget in budgets)
    parameters = [parameter for block in unit.blocks for parameter in block.module.parameters()]
    vectors = [parameter.numel() for parameter in parameters if parameter.dim() == 1]
    widths = [shapes[names[0]][1] for names in inputs]
    order = gathered(((rows, columns * _rank_bytes(columns, recipe.group)) for rows, columns in pruned), ranks)
    rebuilt = (
        (
            rows,
            recipe.reconstruction.gathered_bytes(columns, item, recipe.group)
            + recipe.quantization.gathered_bytes(columns, item),
        )
        for rows, columns in pruned
    )
    sums = sum(
        _allocated(unit, [budget for budget in budgets if budget.names[0] in part.names], recipe)
        for part in parts(unit, recipe.granularity)
    )
    sent = {
        "statistics": summed(WIDE * sum(width + (2 * width**2 if recipe.needs_gram else 0) for width in widths), ranks),
        "rank": order,
        "allocate": summed(sums, ranks) + (order if recipe.quantization.ranks_again else 0),
        "rebuild": gathered(rebuilt, ranks),
        "finetune": summed(recipe.finetune.summed_bytes(pruned, samples), ranks),
        "distill": summed(recipe.distill.summed_bytes(kept, len(pruned), vectors, samples), ranks),
        "measure": summed(WIDE * 2 * channels * len(unit.blocks), ranks),
    }
    return {phase: round(size) for phase, size in sent.items() if size}


def summed(size: int, ranks: int) -> float:
    """Bytes that a rank sends for the sum of tensors of so many bytes."""
    return 2 * (ranks - 1) / ranks * size


def gathered(tensors: Iterable[tuple[int, int]], ranks: int) -> float:
    """Bytes that a rank sends to gather tensors, each of so many rows of so many bytes, from those that have parts."""
    return (ranks - 1) * sum(-(-rows // ranks) * size for rows, size in tensors)


def _allocated(unit: Unit, budgets: Sequence[Budget], recipe: Recipe) -> int:
    """Bytes that are summed up to decide the zeros of a part of the unit, and the clipping of its codes."""

    def shapes(names: Iterable[str]) -> list[tuple[int, int]]:
        return [(unit.prunables[name].rows, unit.prunables[name].columns) for name in names]

    def clipped(names: Sequence[str]) -> int:
        return sum(
            recipe.quantization.clipping_numbers(name, *shape) for name, shape in zip(names, shapes(names), strict=True)
        )

    every = [name for budget in budgets for name in budget.names]
    learning = [name for budget in budgets if 0 < budget.zeros < budget.weights for name in budget.names]
    joint = clipped(learning) if recipe.quantization.learns_jointly else 0
    size = recipe.allocation.summed_bytes(shapes(learning), joint)
    if recipe.quantization.learns_first and recipe.descent is not None:
        size += recipe.descent.steps_bytes(clipped(every))
    return size


def _rank_bytes(columns: int, group: int | None) -> int:
    """Bytes of a weight's place in the pruning order of its row (`masks.rank`)."""
    return 2 if (group or columns) <= NARROW else 4
