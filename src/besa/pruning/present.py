"""Zeros that a model has before it is pruned. Budgets that have no room for them are refused before the work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from besa.counting.budget import Budget, check_room
from besa.pruning.run import Run


def zeros_present(run: Run) -> dict[str, int]:
    """The zeros of each prunable matrix of the dense model, by full name; none counted if the recipe needs no number.

    Args:
        run: its blocks are opened one by one.
    """
    decoder, device, found = run.decoder, run.resources.device, dict[str, int]()
    if run.recipe.allocation.shaped:  # a pattern keeps what zeros there are
        return found
    for block in decoder.blocks:
        run.progress(0, len(decoder.blocks), f"counting zeros, {block.name}")
        with decoder.opened(block, device):
            if block is not decoder.blocks[-1]:
                decoder.prefetch(decoder.blocks[block.index + 1], device)
            weights = {name: block.weight(name).detach() for name in block.prunables}
            kept = torch.stack([w_OI.count_nonzero() for w_OI in weights.values()]).tolist() if weights else []
            found |= {name: w_OI.numel() - own for (name, w_OI), own in zip(weights.items(), kept, strict=True)}
    return found


def check_together(plan: Iterable[Iterable[Budget]], run: Run, present: Mapping[str, int]) -> None:
    """Check, before targets move zeros from one block to another, that all have room for those that are there already.

    Arguments as of `check_each`.

    Raises:
        BesaError: they have not.
    """
    names = [name for budget in _strict(plan, run) for name in budget.names]
    zeros = sum(budget.zeros for budget in _strict(plan, run))
    sizes = _sizes(run)
    there = sum(present.get(name, 0) for name in names)
    check_room(sum(sizes[name] for name in names), zeros, there, "of the pruned matrices")


def check_each(plan: Iterable[Iterable[Budget]], run: Run, present: Mapping[str, int]) -> None:
    """Check that every budget has room for the zeros that are there already.

    Args:
        plan: the budgets of each unit.
        run: gives model and recipe.
        present: as `zeros_present` counted them.

    Raises:
        BesaError: one has not; the sentence is of the first of those whose share of zeros is the largest.
    """
    sizes, full = _sizes(run), []
    for budget in _strict(plan, run):
        for names, zeros in run.recipe.allocation.shares(budget, sizes):
            there, weights = sum(present.get(name, 0) for name in names), sum(sizes[name] for name in names)
            if there > zeros:
                full.append((there / weights, weights, zeros, there, names))
    if full:
        _, weights, zeros, there, (first, *others) = max(full, key=lambda one: one[0])
        check_room(weights, zeros, there, f"of {first}{f' and {len(others)} more' if others else ''}")


def _strict(plan: Iterable[Iterable[Budget]], run: Run) -> list[Budget]:
    """The budgets that zeros may not exceed. Where a recipe quantises, one of no zeros keeps those of rounding."""
    coded = run.recipe.quantization.coding is not None
    return [budget for of_unit in plan for budget in of_unit if budget.zeros or not coded]


def _sizes(run: Run) -> dict[str, int]:
    """Numbers of weights by full name."""
    return {name: prunable.numel for block in run.decoder.blocks for name, prunable in block.prunables.items()}
