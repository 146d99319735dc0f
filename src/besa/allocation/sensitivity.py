"""Sensitivity: one threshold for the whole block, on how much each weight's loss moves the block's output.

Shape suffixes: O rows (output channels), I columns (input channels).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from besa.allocation.problem import Allocated, BlockProblem, RankedLinear
from besa.budget import Budget, apportion, split
from besa.probes import RowSensitivities
from besa.settings import Settings

HALF = 1 << 16


class Sensitivity(Settings):
    """Prune the lowest (error of the row's output) × (squared gradient from the block's output to the row).

    The first is what importance stands for, such as Wanda's W²·Σx²; the second is found by sending random ±1 back
    through the dense block (`probes`). Every linear of a budget competes with every other, and within a row the order
    stays that of the ranks.
    """

    method: Literal["sensitivity"] = "sensitivity"
    every: int = Field(default=4, ge=1, description="one sequence in so many is sent forward and back")

    def allocate(self, problem: BlockProblem) -> Allocated:
        """Zeros of every row, adding up to the budgets; linears that no token reached keep their budget's sparsity.

        Raises:
            BesaError: the block has more zeros already than it is to end with.
        """
        found = RowSensitivities(problem.block)
        for place in range(0, len(problem.inputs_NTC), self.every):
            found.send_back(problem.inputs_NTC[place : place + 1].to(problem.device), seed=problem.seed + place)
        counts: dict[str, Tensor] = {}
        for budget in problem.budgets:
            counts |= _shares(problem, budget, found)
        return Allocated(counts)


def _shares(problem: BlockProblem, budget: Budget, found: RowSensitivities) -> dict[str, Tensor]:
    """The budget's zeros by row."""
    linears = {name: problem.linears[name] for name in budget.names}
    widths = {name: torch.full((len(linear.w_OI),), linear.w_OI.shape[1]) for name, linear in linears.items()}
    wanted = {name: width_O * budget.sparsity for name, width_O in widths.items()}
    competing = [name for name, linear in linears.items() if linear.reached]
    weights = sum(linears[name].w_OI.numel() for name in competing)
    total = split(budget.zeros, [weights, budget.weights - weights])[0]
    keys = [_keys(linears[name], found.rows(name)) for name in competing]
    wanted |= dict(zip(competing, lowest(keys, total), strict=True))
    widths_R = torch.cat(list(widths.values()))
    zeros_R = torch.cat([linear.zeros_O for linear in linears.values()])
    rates_R = torch.cat(list(wanted.values())).double() / widths_R
    shares = apportion(rates_R, widths_R, budget.zeros, zeros_R).split([len(width_O) for width_O in widths.values()])
    return dict(zip(budget.names, shares, strict=True))


def _keys(linear: RankedLinear, gradients_O: Tensor) -> Callable[[], Tensor]:
    """Integers (O, I) that sort as the weights are to go: zeros first, then by the error that a loss makes."""

    def keys_OI() -> Tensor:
        error_OI = linear.importance_OI.float().pow(linear.power) * gradients_O[:, None]
        return (error_OI.view(torch.int32) + 1).masked_fill_(linear.w_OI == 0, 0)

    return keys_OI


def lowest(keys: Sequence[Callable[[], Tensor]], total: int) -> list[Tensor]:
    """How many of the `total` lowest keys of all matrices each row has (O,), int64 on the CPU.

    The threshold is found in two histograms, of the upper and of the lower half of the bits, so that no two matrices of
    keys are there at once. Keys that equal it fall to the earlier matrix and row.

    Args:
        keys: each makes the keys (O, I) of a matrix, non-negative int32.
        total: at most as many as there are keys.
    """
    if not total:
        return [torch.zeros(len(make()), dtype=torch.int64) for make in keys]
    upper, below = _bucket((make() >> 16 for make in keys), total)
    lower, under = _bucket(((key := make())[key >> 16 == upper] & (HALF - 1) for make in keys), total - below)
    threshold, left = upper * HALF + lower, total - below - under
    counts = []
    for make in keys:
        key_OI = make()
        equal_O = (key_OI == threshold).sum(dim=1).cpu()
        before_O = equal_O.cumsum(0) - equal_O
        taken_O = (left - before_O).clamp_(min=0).minimum(equal_O)
        left -= int(taken_O.sum())
        counts.append((key_OI < threshold).sum(dim=1).cpu() + taken_O)
    return counts


def _bucket(values: Iterable[Tensor], total: int) -> tuple[int, int]:
    """The `total`-th lowest of all values, which are below 2^16, and how many are lower than it."""
    histogram = sum(torch.bincount(part.flatten(), minlength=HALF).cpu() for part in values)
    assert isinstance(histogram, Tensor)
    upto = histogram.cumsum(0)
    place = int(torch.searchsorted(upto, total))
    return place, int(upto[place] - histogram[place])
