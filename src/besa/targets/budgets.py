"""How many zeros which linears are to have: the sparsity asked for, with its exceptions, as exact integers."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from besa.budget import Budget, split, zeros_for
from besa.errors import BesaError
from besa.models.blocks import Block
from besa.recipe import Recipe


def budgets(blocks: list[Block], recipe: Recipe) -> list[list[Budget]]:
    """The budgets of every block.

    What `recipe.skip` matches has none and stays dense; what a pattern of `recipe.sparsity_of` matches has one of its
    own, linear by linear; the rest of each block shares one, and all of these together meet the recipe's sparsity.

    Raises:
        BesaError: a pattern matches nothing, two patterns of `sparsity_of` ask different things of one
            linear, or all is skipped.
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
    sizes = [sum(block.prunables[n].numel for n in part) for block, part in zip(blocks, common, strict=True)]
    zeros = split(zeros_for(recipe.sparsity, sum(sizes)), sizes) if any(sizes) else sizes
    plan = []
    for block, names_left, size, count in zip(blocks, common, sizes, zeros, strict=True):
        alone = [n for n in block.prunables if n in own and n not in skipped]
        plan.append([Budget(names_left, size, count)] if names_left else [])
        plan[-1] += [_alone(name, block.prunables[name].numel, own[name]) for name in alone]
    return plan


def _alone(name: str, weights: int, sparsity: float) -> Budget:
    return Budget((name,), weights, zeros_for(sparsity, weights))


def _matching(pattern: str, names: Iterable[str], key: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise BesaError(f"The {key} pattern {pattern} matches no prunable weight: `besa inspect` lists their names.")
    return found
