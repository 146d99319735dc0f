"""Sensitivity: one threshold for the block, on what the removal of a weight adds to the model's loss.

Shape suffixes: O rows (output channels), I columns (input channels).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from besa.counting.budget import Budget, split
from besa.counting.masks import pruning_keys
from besa.counting.precision import widest
from besa.kernels import histogram
from besa.methods.allocation.allocator import Allocator
from besa.methods.allocation.problem import Allocated, BlockProblem, RankedLinear
from besa.methods.apportioning import counted
from besa.methods.survey import one_in

HALF = 1 << 16


class Sensitivity(Allocator):
    """Prune the weights with the lowest (error of the row's output) × (squared gradient of the model's loss there).

    Importance gives the first factor, such as Wanda's W²·Σx². Gradients sent backward through the dense model give the
    second (`fisher`). The product is W² times the diagonal of the Fisher information. All linears of a budget compete.
    Within a row, the order is that of the ranks. Each row's rate goes only `strength` of the way to that of the
    threshold, which adds up errors of single weights: too low a sum for rows that lose most of theirs.
    """

    method: Literal["sensitivity"] = "sensitivity"
    sequences: int = Field(default=8, ge=1, description="calibration sequences that are measured; more if uneven")
    strength: float = Field(default=0.5, ge=0, le=1, description="part of the way from uniform to that threshold")

    def loss_every(self, samples: int) -> int:
        """One calibration sequence in this many is measured; see the setting `sequences`."""
        return one_in(samples, self.sequences)

    @property
    def compares_errors(self) -> bool:
        """True: between all rows of the linears of a budget."""
        return True

    def allocate(self, problem: BlockProblem) -> Allocated:
        """The zeros of every row; linears that no token reached get the sparsity of their budget.

        Raises:
            BesaError: the block already has more zeros than its budget.
        """
        counts: dict[str, Tensor] = {}
        for budget in problem.budgets:
            rates = {
                name: budget.sparsity + self.strength * (rates_O - budget.sparsity)
                for name, rates_O in rates_by_threshold(problem, budget).items()
            }
            linears = {name: problem.linears[name] for name in rates}
            widths = {name: linear.w_OI.shape[1] for name, linear in linears.items()}
            counts |= counted(rates, widths, budget.zeros, {name: linear.zeros_O for name, linear in linears.items()})
        return Allocated(counts)


def rates_by_threshold(problem: BlockProblem, budget: Budget) -> dict[str, Tensor]:
    """The pruning rate of each row (O,) by full name, from one threshold for all reached linears.

    Linears that no token reached, on the pruned path or where gradients were measured, have the sparsity of the budget.
    """
    linears = {name: problem.linears[name] for name in budget.names}
    dtype = widest(problem.device)
    rates = {
        name: torch.full((len(one.w_OI),), budget.sparsity, dtype=dtype, device=one.w_OI.device)
        for name, one in linears.items()
    }
    gradients = {name: problem.gradients_O(name) for name in linears}
    felt = torch.stack([gradients_O.any() for gradients_O in gradients.values()]).tolist()  # waits once
    competing = [name for name, of_loss in zip(linears, felt, strict=True) if of_loss and linears[name].reached]
    weights = sum(linears[name].w_OI.numel() for name in competing)
    total = split(budget.zeros, [weights, budget.weights - weights])[0]
    counts = lowest([_keys(linears[name], gradients[name]) for name in competing], total)
    for name, counts_O in zip(competing, counts, strict=True):
        rates[name] = counts_O.to(dtype) / linears[name].w_OI.shape[1]
    return rates


def _keys(linear: RankedLinear, gradients_O: Tensor) -> Callable[[], Tensor]:
    """A function that makes integers (O, I) in pruning order: zeros first, then by the error of removing a weight."""

    def keys_OI() -> Tensor:
        return pruning_keys(linear.errors(gradients_O), linear.w_OI)

    return keys_OI


def lowest(keys: Sequence[Callable[[], Tensor]], total: int) -> list[Tensor]:
    """How many of the `total` lowest keys of all matrices are in each row (O,), int64.

    Two histograms, of the upper and of the lower half of the bits, give the threshold. Memory therefore never holds the
    keys of two matrices at once, and the host waits for nothing. Of keys equal to the threshold, those of the earlier
    matrix and row count first.

    Args:
        keys: each makes the keys (O, I) of a matrix, non-negative int32, on one device.
        total: at most the number of keys.
    """
    if not total:
        return [torch.zeros_like(make()[:, 0], dtype=torch.int64) for make in keys]
    upper, below = _bucket((histogram(make() >> 16, HALF) for make in keys), total)
    lower, under = _bucket((_lower_halves(make(), upper) for make in keys), total - below)
    threshold, left = upper * HALF + lower, total - below - under
    counts = []
    for make in keys:
        key_OI = make()
        equal_O = (key_OI == threshold).sum(dim=1)
        before_O = equal_O.cumsum(0) - equal_O
        taken_O = (left - before_O).clamp_(min=0).minimum(equal_O)
        left = left - taken_O.sum()
        counts.append((key_OI < threshold).sum(dim=1) + taken_O)
    return counts


def _lower_halves(key_OI: Tensor, upper: Tensor) -> Tensor:
    """The histogram (HALF,) of the lower halves of the keys with this upper half."""
    return histogram(torch.where(key_OI >> 16 == upper, key_OI & (HALF - 1), HALF), HALF)


def _bucket(histograms: Iterable[Tensor], total: Tensor | int) -> tuple[Tensor, Tensor]:
    """The bin (scalar) of the `total`-th lowest value of all histograms, and how many values are in lower bins."""
    whole = sum(histograms)
    assert isinstance(whole, Tensor)
    upto = whole.cumsum(0)
    place_1 = (upto < total).sum().reshape(1)
    return place_1[0], (upto - whole).gather(0, place_1)[0]
