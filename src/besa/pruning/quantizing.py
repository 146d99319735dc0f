"""Quantisation while a block is pruned: learn the clipping, and round the weights to their final grids.

Shape suffixes: O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from besa.counting.budget import Budget
from besa.counting.masks import hard_mask, rank
from besa.methods.allocation import Allocated, BlockProblem, RankedLinear
from besa.methods.allocation.changing import ChangingLinears
from besa.methods.allocation.descent import Descent
from besa.methods.apportioning import counted
from besa.methods.recipe import Recipe
from besa.methods.targets.budgets import budgets
from besa.models.blocks import Block
from besa.observing.input_statistics import InputStatistics
from besa.quantization import Clipping, Coding, Quantized
from besa.storage.formats import codes
from besa.system import ranks


def check(recipe: Recipe, model: nn.Module, blocks: list[Block], *, as_codes: bool) -> None:
    """Check before the work that what a recipe prunes can be quantised, if it quantises.

    Args:
        recipe: the method.
        model: may be on the meta device.
        blocks: of the model.
        as_codes: whether the checkpoint will have codes.

    Raises:
        BesaError: the columns of a linear are no whole number of groups, or transformers cannot load it as codes.
    """
    if (coding := recipe.quantization.coding) is None:
        return
    prunables = {name: prunable for block in blocks for name, prunable in block.prunables.items()}
    names = [name for of_unit in budgets(blocks, recipe) for budget in of_unit for name in budget.names]
    for name in names:
        coding.groups(name, prunables[name].columns)
    if as_codes:
        codes.check(model, names)


def allocate_and_quantize(
    problem: BlockProblem, recipe: Recipe, quantization: Coding, statistics: Mapping[str, InputStatistics]
) -> tuple[Allocated, dict[str, Quantized]]:
    """Decide the zeros and the codes of a block.

    Args:
        problem: of the block; its ranks are those of the dense weights.
        recipe: gives allocation, importance and descent.
        quantization: of the recipe.
        statistics: of the linears' inputs, by full name.

    Returns:
        The zeros of each row, and the quantised weights by full name.

    Raises:
        BesaError: rounding alone makes more zeros than a budget allows.
    """
    asked = problem.budgets
    clippings = {name: quantization.clipping_of(name, linear.w_OI) for name, linear in problem.linears.items()}
    losses: list[float] = []
    if quantization.learns_first and recipe.descent is not None:
        losses = learn_clipping(problem, clippings, recipe.descent)
    if quantization.ranks_again:
        linears = {
            name: _ranked(recipe, linear, clippings[name], statistics[name]) for name, linear in problem.linears.items()
        }
        problem = replace(problem, linears=linears)
    if quantization.learns_jointly:
        problem = replace(problem, clippings=clippings)
    if not quantization.learns_jointly:  # a budget of no zeros accepts those of rounding, and has nothing to learn
        problem = replace(problem, budgets=[budget for budget in problem.budgets if budget.zeros])
    allocated = recipe.allocation.allocate(problem)
    quantized = settle(problem.linears, clippings, allocated.counts, asked)
    return replace(allocated, losses=[*losses, *allocated.losses]), quantized


def allocate_before_moving(problem: BlockProblem, recipe: Recipe, quantization: Coding) -> Allocated:
    """Decide the zeros of a block whose weights move before they become codes.

    Arguments as of `allocate_and_quantize`.

    Weights that are zero come first, then those that round to zero where they are now, both by their importance. Where
    a budget prunes nothing, these alone become zero.

    Returns:
        The zeros of each row, and the ranks by which they are chosen.

    Raises:
        BesaError: the block already has more zeros than its budget allows.
    """
    order: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for name, linear in problem.linears.items():
        q_OI = quantization.clipping_of(name, linear.w_OI).quantized(linear.w_OI.dtype).weight()
        order[name] = _zeros_first(linear, q_OI, recipe.group)
        counts[name] = (q_OI == 0).sum(dim=1)
    linears = {name: replace(linear, ranks_OI=order[name]) for name, linear in problem.linears.items()}
    pruning = [budget for budget in problem.budgets if budget.zeros]
    allocated = recipe.allocation.allocate(replace(problem, linears=linears, budgets=pruning))
    return replace(allocated, counts=counts | allocated.counts, ranks=order | allocated.ranks)


def _zeros_first(linear: RankedLinear, q_OI: Tensor, group: int | None) -> Tensor:
    """The pruning order of a weight (O, I): zeros come first, then what rounds to zero; within both, by importance."""

    def of_rows(rows: slice) -> Tensor:
        w_OI = linear.w_OI[rows]
        places_OI = rank(linear.importance_OI[rows], w_OI).float()  # exact, up to 2^24
        return rank(places_OI.add_(q_OI[rows] != 0, alpha=w_OI.shape[1]), w_OI, group)

    return ranks.by_rows(of_rows, len(q_OI))


def _ranked(recipe: Recipe, linear: RankedLinear, clipping: Clipping, statistics: InputStatistics) -> RankedLinear:
    """The weight with the pruning order of its quantised form; weights that round to zero come first."""
    q_OI = clipping.quantized(linear.w_OI.dtype).weight()
    importance_OI = recipe.importance.score(q_OI, statistics)
    scored = replace(linear, importance_OI=importance_OI)
    return replace(scored, ranks_OI=ranks.by_rows(lambda rows: rank(importance_OI[rows], q_OI[rows]), len(q_OI)))


def learn_clipping(problem: BlockProblem, clippings: Mapping[str, Clipping], descent: Descent) -> list[float]:
    """Learn the clipping while the block is still dense, as OmniQuant does; return the loss at every step."""
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
    """The final weights: rounded to their grids, with exactly as many zeros as each budget asks for.

    Weights that round to zero are pruned first, then those of the lowest ranks. Where rounding alone gives a row more
    zeros than its count, none of its other weights is pruned. A budget of no zeros prunes nothing and keeps the zeros
    of rounding.

    Args:
        linears: ranked weights by full name.
        clippings: of every linear.
        counts: zeros of each row (O,) by full name, before rounding is considered.
        budgets: to be met.

    Raises:
        BesaError: rounding alone makes more zeros than a budget allows.
    """
    settled: dict[str, Quantized] = {}
    for budget in budgets:
        parts = {name: clippings[name].quantized(linears[name].w_OI.dtype) for name in budget.names}
        if budget.zeros == 0:
            settled |= parts
            continue
        least = {name: (part.weight() == 0).sum(dim=1) for name, part in parts.items()}
        widths = {name: part.codes_OI.shape[1] for name, part in parts.items()}
        rates = {name: counts[name] / width for name, width in widths.items()}
        for name, counts_O in counted(rates, widths, budget.zeros, least).items():
            ranks_OI = rank(linears[name].importance_OI, parts[name].weight())
            settled[name] = parts[name].pruned(hard_mask(ranks_OI, counts_O))
    return settled
