"""A look at all blocks before the work: damaged weights, and budgets without room for the zeros that are there already.

Both would else be found when a block's turn comes, which may be hours later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from besa.counting.budget import Budget, check_room
from besa.pruning.run import Run


def zeros_present(run: Run) -> dict[str, int]:
    """The zeros of each prunable matrix of the dense model, by full name.

    Blocks are opened one by one where they are: those of files in memory, not on the device that prunes.

    Args:
        run: its blocks are dense.

    Raises:
        BesaError: the weights of a block are damaged.
    """
    decoder, found = run.decoder, dict[str, int]()
    for block in decoder.blocks:
        run.progress(0, len(decoder.blocks), f"reading the weights, {block.name}")
        home = next(block.module.parameters()).device
        with decoder.opened(block, torch.device("cpu") if home.type == "meta" else home):
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
    sizes, strict = _sizes(run), _strict(plan, run)
    names = [name for budget in strict for name in budget.names]
    there = sum(present.get(name, 0) for name in names)
    zeros = sum(budget.zeros for budget in strict)
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
    """The budgets that zeros may not exceed.

    A pattern keeps what zeros there are. Where a recipe quantises, a budget of no zeros keeps those of rounding.
    """
    if run.recipe.allocation.shaped:
        return []
    coded = run.recipe.quantization.coding is not None
    return [budget for of_unit in plan for budget in of_unit if budget.zeros or not coded]


def _sizes(run: Run) -> dict[str, int]:
    """Numbers of weights by full name."""
    return {name: prunable.numel for block in run.decoder.blocks for name, prunable in block.prunables.items()}
