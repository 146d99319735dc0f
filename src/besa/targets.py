"""How many zeros which linears are to have: the sparsity asked for, with its exceptions, as exact integers."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from besa.budget import Budget, split, zeros_for
from besa.errors import BesaError
from besa.models.blocks import Block
from besa.models.units import sharing, units
from besa.recipe import Recipe


def budgets(blocks: list[Block], recipe: Recipe) -> list[list[Budget]]:
    """The budgets of every unit of the recipe's granularity.

    What `recipe.skip` matches has none and stays dense; what a pattern of `recipe.sparsity_of` matches has one of its
    own, linear by linear; the rest shares budgets as the granularity says, and all of these together meet the recipe's
    sparsity.

    Raises:
        BesaError: a pattern matches nothing, two patterns of `sparsity_of` ask different things of one
            linear, all is skipped, or the model has no parts of that granularity.
    """
    whole = units(blocks, recipe.granularity)
    prunables = {name: prunable for unit in whole for name, prunable in unit.prunables.items()}
    names = list(prunables)
    skipped = {name for pattern in recipe.skip for name in _matching(pattern, names, "skip")}
    own: dict[str, float] = {}
    for pattern, sparsity in recipe.sparsity_of.items():
        for name in _matching(pattern, names, "sparsity_of"):
            if own.setdefault(name, sparsity) != sparsity:
                raise BesaError(f"Two patterns of sparsity_of match {name}: make them disjoint.")
    if skipped.issuperset(names):
        raise BesaError("The skip patterns leave nothing to prune: drop one.")
    apart = skipped.union(own)
    shared = [
        [left for group in sharing(unit, recipe.granularity) if (left := tuple(n for n in group if n not in apart))]
        for unit in whole
    ]
    sizes = [sum(prunables[name].numel for name in group) for groups in shared for group in groups]
    zeros = iter(split(zeros_for(recipe.sparsity, sum(sizes)), sizes))
    plan = []
    for unit, groups in zip(whole, shared, strict=True):
        plan.append([Budget(group, sum(prunables[n].numel for n in group), next(zeros)) for group in groups])
        alone = [name for name in unit.prunables if name in own and name not in skipped]
        plan[-1] += [_alone(name, prunables[name].numel, own[name]) for name in alone]
    return plan


def _alone(name: str, weights: int, sparsity: float) -> Budget:
    return Budget((name,), weights, zeros_for(sparsity, weights))


def _matching(pattern: str, names: Iterable[str], key: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise BesaError(f"The {key} pattern {pattern} matches no prunable weight: `besa inspect` lists their names.")
    return found
