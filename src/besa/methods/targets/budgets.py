"""Budgets of a recipe: its sparsity, with the exceptions, as exact numbers of zeros."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch

from besa.counting.budget import Budget, split, zeros_for
from besa.errors import BesaError
from besa.methods.apportioning import apportion
from besa.models.blocks import Block
from besa.models.prunable import Prunable
from besa.models.units import sharing, units

if TYPE_CHECKING:
    from besa.methods.recipe import Recipe


def budgets(
    blocks: list[Block],
    recipe: Recipe,
    targets: Sequence[float] | None = None,
    present: Mapping[str, int] | None = None,
) -> list[list[Budget]]:
    """The budgets of every unit of the recipe's granularity.

    Linears that match `recipe.skip` have no budget and stay dense. Linears that match `recipe.sparsity_of` have a
    budget each. The others share budgets as the granularity says, and together meet the recipe's sparsity.

    Args:
        blocks: of the model.
        recipe: gives sparsity, exceptions and granularity.
        targets: for each block, the sparsity of the linears that share budgets, by default the recipe's; or what else
            the allocation's own targets measured.
        present: zeros that linears have already, by full name; targets give none of their groups fewer. Linears that
            are not named have none.

    Raises:
        BesaError: a pattern matches nothing, or of `sparsity_of` only what is skipped; two patterns of `sparsity_of`
            give one linear different sparsities; everything is skipped; the model has no parts of that granularity or
            no units to prune whole; targets are given, and more zeros are present than all may have together.
    """
    if recipe.allocation.whole_structures:
        return _of_structures(blocks, recipe, targets)
    in_order = units(blocks, recipe.granularity)
    prunables = {name: prunable for unit in in_order for name, prunable in unit.prunables.items()}
    common, exceptions = shared_names(blocks, recipe)
    sharers = {name for names in common for name in names}
    if recipe.group is not None:
        pruned = sharers.union(*exceptions)
        _check_groups(recipe.group, {name: each for name, each in prunables.items() if name in pruned})
    shared = [
        [names for group in sharing(unit, recipe.granularity) if (names := tuple(n for n in group if n in sharers))]
        for unit in in_order
    ]
    sizes = [sum(prunables[name].numel for name in group) for groups in shared for group in groups]
    total = zeros_for(recipe.sparsity, sum(sizes))
    if targets is None:
        zeros = iter(split(total, sizes))
    else:
        target_of = {name: target for names, target in zip(common, targets, strict=True) for name in names}
        groups = [group for of_unit in shared for group in of_unit]
        ideal = [sum(prunables[name].numel * target_of[name] for name in group) for group in groups]
        least = [sum((present or {}).get(name, 0) for name in group) for group in groups]
        zeros = iter(_nearest(ideal, sizes, total, least))
    plan = []
    for unit, groups in zip(in_order, shared, strict=True):
        plan.append([Budget(group, sum(prunables[n].numel for n in group), next(zeros)) for group in groups])
        for block in unit.blocks:
            sparsities = exceptions[blocks.index(block)]
            plan[-1] += [recipe.allocation.budget(block, (name,), sparsity) for name, sparsity in sparsities.items()]
    return plan


def _of_structures(blocks: list[Block], recipe: Recipe, targets: Sequence[float] | None) -> list[list[Budget]]:
    """The budgets of blocks that lose whole structures."""
    common, exceptions = shared_names(blocks, recipe)
    if any(exceptions):
        raise BesaError(
            f"allocation.method={recipe.allocation.method} takes whole structures out of several linears: leave out "
            "sparsity_of."
        )
    return [[budget] for budget in recipe.allocation.budgets(blocks, common, recipe.sparsity, targets)]


def shared_names(blocks: list[Block], recipe: Recipe) -> tuple[list[tuple[str, ...]], list[dict[str, float]]]:
    """For each block, the matrices that share the recipe's sparsity, and the sparsities of those in `sparsity_of`.

    Raises:
        BesaError: as `budgets`.
    """
    names = [name for block in blocks for name in block.prunables]
    skipped = {name for pattern in recipe.skip for name in _matching(pattern, names, "skip")}
    sparsity_of: dict[str, float] = {}
    for pattern, sparsity in recipe.sparsity_of.items():
        own = _matching(pattern, names, "sparsity_of")
        if skipped.issuperset(own):
            raise BesaError(f"The sparsity_of pattern {pattern} decides nothing: all that it matches is skipped.")
        for name in own:
            if sparsity_of.setdefault(name, sparsity) != sparsity:
                raise BesaError(f"Two patterns of sparsity_of match {name}: make them disjoint.")
    if skipped.issuperset(names):
        raise BesaError("The skip patterns leave nothing to prune: drop one.")
    pruned = [[name for name in block.prunables if name not in skipped] for block in blocks]
    common = [tuple(name for name in names if name not in sparsity_of) for names in pruned]
    exceptions = [{name: sparsity_of[name] for name in names if name in sparsity_of} for names in pruned]
    return common, exceptions


def _nearest(ideal: list[float], sizes: list[int], total: int, least: list[int]) -> list[int]:
    """Integers that add up to `total` and are nearest to the `ideal` zeros of groups of `sizes` weights.

    None is lower than the zeros that are there already, `least`.
    """
    sizes_B = torch.tensor(sizes, dtype=torch.int64)
    rates_B = torch.tensor(ideal, dtype=torch.float64) / sizes_B
    counts: list[int] = apportion(rates_B, sizes_B, total, torch.tensor(least, dtype=torch.int64)).tolist()
    return counts


def _check_groups(group: int, prunables: dict[str, Prunable]) -> None:
    """Check that the columns of every matrix are a whole number of groups."""
    for name, prunable in prunables.items():
        if prunable.columns % group:
            raise BesaError(
                f"{name} has {prunable.columns} columns, which are no whole number of groups of {group}: leave it out "
                "with --skip."
            )


def _matching(pattern: str, names: Iterable[str], key: str) -> list[str]:
    matching = [name for name in names if fnmatchcase(name, pattern)]
    if not matching:
        raise BesaError(f"The {key} pattern {pattern} matches no prunable weight: `besa inspect` lists their names.")
    return matching
