"""How many zeros which linears are to have: the sparsity asked for, with its exceptions, as exact integers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch

from besa.counting.budget import Budget, apportion, split, zeros_for
from besa.errors import BesaError
from besa.models.blocks import Block
from besa.models.couplings import alike
from besa.models.prunable import Prunable
from besa.models.units import sharing, units

if TYPE_CHECKING:
    from besa.methods.recipe import Recipe


def budgets(blocks: list[Block], recipe: Recipe, targets: Sequence[float] | None = None) -> list[list[Budget]]:
    """The budgets of every unit of the recipe's granularity.

    What `recipe.skip` matches has none and stays dense; what a pattern of `recipe.sparsity_of` matches has one of its
    own, linear by linear; the rest shares budgets as the granularity says, and all of these together meet the recipe's
    sparsity.

    Args:
        blocks: of the model.
        recipe: whose sparsity, exceptions and granularity to use.
        targets: the sparsity of what shares the recipe's, by block, which is that in the mean; by default the same.

    Raises:
        BesaError: a pattern matches nothing, two patterns of `sparsity_of` ask different things of one
            linear, all is skipped, or the model has no parts of that granularity or no units of that kind.
    """
    if recipe.allocation.whole_structures:
        return _of_units(blocks, recipe)
    whole = units(blocks, recipe.granularity)
    prunables = {name: prunable for unit in whole for name, prunable in unit.prunables.items()}
    common, own = shared_names(blocks, recipe)
    left = {name for names in common for name in names}
    if recipe.group is not None:
        _check_groups(recipe.group, {name: prunables[name] for name in left.union(*own)})
    shared = [
        [names for group in sharing(unit, recipe.granularity) if (names := tuple(n for n in group if n in left))]
        for unit in whole
    ]
    sizes = [sum(prunables[name].numel for name in group) for groups in shared for group in groups]
    total = zeros_for(recipe.sparsity, sum(sizes))
    if targets is None:
        zeros = iter(split(total, sizes))
    else:
        target_of = {name: target for names, target in zip(common, targets, strict=True) for name in names}
        wanted = [sum(prunables[n].numel * target_of[n] for n in group) for groups in shared for group in groups]
        zeros = iter(_nearest(wanted, sizes, total))
    plan = []
    for unit, groups in zip(whole, shared, strict=True):
        plan.append([Budget(group, sum(prunables[n].numel for n in group), next(zeros)) for group in groups])
        for block in unit.blocks:
            alone = own[blocks.index(block)]
            plan[-1] += [recipe.allocation.budget(block, (name,), sparsity) for name, sparsity in alone.items()]
    return plan


def _of_units(blocks: list[Block], recipe: Recipe) -> list[list[Budget]]:
    """What whole units come to, the same in every block."""
    alike(blocks)
    common, own = shared_names(blocks, recipe)
    if any(own):
        raise BesaError("structured pruning takes whole units out of several linears: leave out sparsity_of.")
    plan = [
        recipe.allocation.budget(block, names, recipe.sparsity) for block, names in zip(blocks, common, strict=True)
    ]
    if len({(budget.weights, budget.zeros) for budget in plan}) > 1:
        raise BesaError("structured pruning leaves every block the same shapes: skip the same linears in all of them.")
    return [[budget] for budget in plan]


def shared_names(blocks: list[Block], recipe: Recipe) -> tuple[list[tuple[str, ...]], list[dict[str, float]]]:
    """By block, the matrices that share the recipe's sparsity, and those with one of their own.

    Raises:
        BesaError: as `budgets`.
    """
    names = [name for block in blocks for name in block.prunables]
    skipped = {name for pattern in recipe.skip for name in _matching(pattern, names, "skip")}
    own: dict[str, float] = {}
    for pattern, sparsity in recipe.sparsity_of.items():
        for name in _matching(pattern, names, "sparsity_of"):
            if own.setdefault(name, sparsity) != sparsity:
                raise BesaError(f"Two patterns of sparsity_of match {name}: make them disjoint.")
    if skipped.issuperset(names):
        raise BesaError("The skip patterns leave nothing to prune: drop one.")
    common = [tuple(n for n in block.prunables if n not in skipped and n not in own) for block in blocks]
    alone = [{n: own[n] for n in block.prunables if n in own and n not in skipped} for block in blocks]
    return common, alone


def _nearest(wanted: list[float], sizes: list[int], total: int) -> list[int]:
    """Integers that add up to `total`, as near to `wanted` zeros of parts of `sizes` weights as they come."""
    sizes_B = torch.tensor(sizes, dtype=torch.int64)
    rates_B = torch.tensor(wanted, dtype=torch.float64) / sizes_B
    counts: list[int] = apportion(rates_B, sizes_B, total, torch.zeros_like(sizes_B)).tolist()
    return counts


def _check_groups(group: int, prunables: dict[str, Prunable]) -> None:
    """Refuse a pattern that rows are no whole number of."""
    for name, prunable in prunables.items():
        if prunable.columns % group:
            raise BesaError(
                f"{name} has {prunable.columns} columns, which are no whole number of groups of {group}: leave it out "
                "with --skip."
            )


def _matching(pattern: str, names: Iterable[str], key: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise BesaError(f"The {key} pattern {pattern} matches no prunable weight: `besa inspect` lists their names.")
    return found
