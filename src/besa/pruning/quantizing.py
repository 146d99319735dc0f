"""What quantisation adds to the pruning of a block: where clipping starts, how it is learned, and where weights settle.

Shape suffixes: O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from besa.counting.budget import Budget, apportion
from besa.counting.masks import hard_mask, rank
from besa.methods.allocation import Allocated, BlockProblem, RankedLinear
from besa.methods.allocation.changing import ChangingLinears
from besa.methods.allocation.descent import Descent
from besa.methods.recipe import Recipe
from besa.models.units import Unit
from besa.observing.input_statistics import InputStatistics
from besa.quantization import Clipping, MinMax, Quantized


def check(quantization: MinMax, whole: list[Unit], plan: list[list[Budget]]) -> None:
    """Refuse beforehand what could not be quantised.

    Args:
        quantization: settings.
        whole: the units of the model.
        plan: the budgets of every unit; what stands in none stays as it is.

    Raises:
        BesaError: rows of a linear are no whole number of groups.
    """
    for unit, own in zip(whole, plan, strict=True):
        for budget in own:
            for name in budget.names:
                quantization.groups(name, unit.prunables[name].columns)


def allocate(
    problem: BlockProblem, recipe: Recipe, quantization: MinMax, statistics: Mapping[str, InputStatistics]
) -> tuple[Allocated, dict[str, Quantized]]:
    """Decide a block's zeros and its codes.

    Args:
        problem: with the ranks of the weights as they are.
        recipe: whose allocation and importance to use.
        quantization: of the recipe.
        statistics: of the linears' inputs.

    Raises:
        BesaError: rounding alone makes more zeros than a budget allows.
    """
    clippings = {name: quantization.clipping_of(name, linear.w_OI) for name, linear in problem.linears.items()}
    losses: list[float] = []
    if quantization.learns_first and recipe.descent is not None:
        losses = learn_clipping(problem, clippings, recipe.descent)
    if quantization.ranks == "quantized" and quantization.clipping != "none":
        linears = {
            name: _ranked(recipe, linear, clippings[name], statistics[name]) for name, linear in problem.linears.items()
        }
        problem = replace(problem, linears=linears)
    if quantization.learns_jointly:
        problem = replace(problem, clippings=clippings)
    asked = [budget for budget in problem.budgets if budget.zeros]  # to prune nothing is to keep what zeros there are
    allocated = recipe.allocation.allocate(replace(problem, budgets=asked))
    quantized = settle(problem.linears, clippings, allocated.counts, problem.budgets)
    return replace(allocated, losses=[*losses, *allocated.losses]), quantized


def _ranked(recipe: Recipe, linear: RankedLinear, clipping: Clipping, statistics: InputStatistics) -> RankedLinear:
    """The same weight, in the order in which its quantised one is pruned; what is rounded to zero comes first."""
    q_OI = clipping.quantized(linear.w_OI.dtype).weight()
    importance_OI = recipe.importance.score(q_OI, statistics)
    return replace(linear, importance_OI=importance_OI, ranks_OI=rank(importance_OI, q_OI))


def learn_clipping(problem: BlockProblem, clippings: Mapping[str, Clipping], descent: Descent) -> list[float]:
    """Learn the clipping of a block that is not pruned, as OmniQuant does; returns the loss at every step."""
    linears = {name: linear for name, linear in problem.linears.items() if linear.reached}
    if not linears:
        return []
    changing = ChangingLinears(linears, None, clippings, descent.dtype(problem))
    return descent.descend(problem, [changing], {})


def settle(
    linears: Mapping[str, RankedLinear],
    clippings: Mapping[str, Clipping],
    counts: Mapping[str, Tensor],
    budgets: list[Budget],
) -> dict[str, Quantized]:
    """The weights as they will be written: on their final grids, with the zeros of each budget, exactly.

    Weights that are rounded to zero count first, before those of the lowest ranks; so rows that have more of them than
    they were to lose lose no others. A budget of no zeros prunes nothing, and has what rounding leaves.

    Raises:
        BesaError: rounding alone makes more zeros than a budget allows.
    """
    settled: dict[str, Quantized] = {}
    for budget in budgets:
        parts = {name: clippings[name].quantized(linears[name].w_OI.dtype) for name in budget.names}
        if budget.zeros == 0:
            settled |= parts
            continue
        zero = {name: part.weight() == 0 for name, part in parts.items()}
        widths = torch.cat([torch.full((len(z_OI),), z_OI.shape[1]) for z_OI in zero.values()])
        wanted = torch.cat([counts[name] for name in budget.names]) / widths
        least = torch.cat([z_OI.sum(dim=1).cpu() for z_OI in zero.values()])
        shares = apportion(wanted, widths, budget.zeros, least).split([len(z_OI) for z_OI in zero.values()])
        for (name, part), counts_O in zip(parts.items(), shares, strict=True):
            ranks_OI = rank(linears[name].importance_OI, part.weight())
            settled[name] = part.pruned(hard_mask(ranks_OI, counts_O.to(ranks_OI.device)))
    return settled
