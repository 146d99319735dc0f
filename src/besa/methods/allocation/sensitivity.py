"""Sensitivity: one threshold for the whole block, on how much each weight's loss moves the block's output.

Shape suffixes: O rows (output channels), I columns (input channels).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from besa.counting.budget import Budget, apportion, split
from besa.methods.allocation.allocator import Allocator
from besa.methods.allocation.problem import Allocated, BlockProblem, RankedLinear
from besa.observing.probes import RowSensitivities

HALF = 1 << 16


class Sensitivity(Allocator):
    """Prune the lowest (error of the row's output) × (squared gradient from the block's output to the row).

    The first is what importance stands for, such as Wanda's W²·Σx²; the second is found by sending random ±1 back
    through the dense block (`probes`). Every linear of a budget competes with every other, and within a row the order
    stays that of the ranks.
    """

    method: Literal["sensitivity"] = "sensitivity"
    every: int = Field(default=4, ge=1, description="one sequence in so many is sent forward and back")

    @property
    def probes_every(self) -> int:
        """One calibration sequence in so many is sent back through each block."""
        return self.every

    @property
    def compares_errors(self) -> bool:
        """Yes: between all rows of the linears of a budget."""
        return True

    def allocate(self, problem: BlockProblem) -> Allocated:
        """Zeros of every row, adding up to the budgets; linears that no token reached keep their budget's sparsity.

        Raises:
            BesaError: the block has more zeros already than it is to end with.
        """
        found = row_sensitivities(problem, self.every)
        counts: dict[str, Tensor] = {}
        for budget in problem.budgets:
            rates = rates_by_threshold(problem, budget, found)
            rows = [len(own_O) for own_O in rates.values()]
            widths = [problem.linears[name].w_OI.shape[1] for name in rates]
            widths_R = torch.tensor(widths).repeat_interleave(torch.tensor(rows))
            zeros_R = torch.cat([problem.linears[name].zeros_O for name in rates])
            shares_R = apportion(torch.cat(list(rates.values())), widths_R, budget.zeros, zeros_R)
            counts |= dict(zip(rates, shares_R.split(rows), strict=True))
        return Allocated(counts)


def row_sensitivities(problem: BlockProblem, every: int) -> RowSensitivities:
    """Of the block's rows, from one calibration sequence in so many."""
    found = RowSensitivities(problem.block)
    for place in range(0, len(problem.inputs_NTC), every):
        found.send_back(problem.inputs_NTC[place : place + 1].to(problem.device), seed=problem.seed + place)
    return found


def rates_by_threshold(problem: BlockProblem, budget: Budget, found: RowSensitivities) -> dict[str, Tensor]:
    """The pruning rate of each row (O,), float64 on the CPU, that one threshold for all reached linears gives."""
    linears = {name: problem.linears[name] for name in budget.names}
    rates = {name: torch.full((len(own.w_OI),), budget.sparsity, dtype=torch.float64) for name, own in linears.items()}
    competing = [name for name, linear in linears.items() if linear.reached]
    weights = sum(linears[name].w_OI.numel() for name in competing)
    total = split(budget.zeros, [weights, budget.weights - weights])[0]
    counts = lowest([_keys(linears[name], found.rows(name)) for name in competing], total)
    return rates | {n: own_O.double() / linears[n].w_OI.shape[1] for n, own_O in zip(competing, counts, strict=True)}


def _keys(linear: RankedLinear, gradients_O: Tensor) -> Callable[[], Tensor]:
    """Integers (O, I) that sort as the weights are to go: zeros first, then by the error that a loss makes."""

    def keys_OI() -> Tensor:
        return (linear.errors(gradients_O).view(torch.int32) + 1).masked_fill_(linear.w_OI == 0, 0)

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
