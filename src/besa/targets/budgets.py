"""How many zeros which linears are to have: the sparsity asked for, with its exceptions, as exact integers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch

from besa.budget import Budget, apportion, split, zeros_for
from besa.errors import BesaError
from besa.models.blocks import Block

if TYPE_CHECKING:
    from besa.recipe import Recipe


def budgets(blocks: list[Block], recipe: Recipe, targets: Sequence[float] | None = None) -> list[list[Budget]]:
    """The budgets of every block.

    What `recipe.skip` matches has none and stays dense; what a pattern of `recipe.sparsity_of` matches has one of its
    own, linear by linear; the rest of each block shares one, and all of these together meet the recipe's sparsity.

    Args:
        blocks: of the model.
        recipe: whose sparsity and exceptions to use.
        targets: the sparsity of what shares the recipe's, by block, which is that in the mean; by default the same.

    Raises:
        BesaError: a pattern matches nothing, two patterns of `sparsity_of` ask different things of one
            linear, or all is skipped.
    """
    common, own = shared_names(blocks, recipe)
    if recipe.group is not None:
        _check_groups(recipe.group, blocks, common)
    sizes = [sum(block.prunables[n].numel for n in part) for block, part in zip(blocks, common, strict=True)]
    zeros = _shares(zeros_for(recipe.sparsity, sum(sizes)), sizes, targets)
    plan = []
    for block, names_left, size, count, alone in zip(blocks, common, sizes, zeros, own, strict=True):
        plan.append([Budget(names_left, size, count)] if names_left else [])
        plan[-1] += [_alone(name, block.prunables[name].numel, sparsity) for name, sparsity in alone.items()]
    return plan


def _check_groups(group: int, blocks: list[Block], names: list[tuple[str, ...]]) -> None:
    """Refuse a pattern that rows are no whole number of."""
    for block, own in zip(blocks, names, strict=True):
        for name in own:
            if block.prunables[name].columns % group:
                raise BesaError(
                    f"{name} has {block.prunables[name].columns} columns, which are no whole number of groups of "
                    f"{group}: leave it out with --skip."
                )


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


def _shares(total: int, sizes: list[int], targets: Sequence[float] | None) -> list[int]:
    """`total` zeros by block, in proportion to `sizes`, or as near as integers come to `targets`."""
    if targets is None or not any(sizes):
        return split(total, sizes) if any(sizes) else sizes
    shares = [0] * len(sizes)
    places = [place for place, size in enumerate(sizes) if size]
    rates_B = torch.tensor([targets[place] for place in places], dtype=torch.float64)
    widths_B = torch.tensor([sizes[place] for place in places])
    for place, count in zip(places, apportion(rates_B, widths_B, total, torch.zeros_like(widths_B)), strict=True):
        shares[place] = int(count)
    return shares


def _alone(name: str, weights: int, sparsity: float) -> Budget:
    return Budget((name,), weights, zeros_for(sparsity, weights))


def _matching(pattern: str, names: Iterable[str], key: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise BesaError(f"The {key} pattern {pattern} matches no prunable weight: `besa inspect` lists their names.")
    return found
