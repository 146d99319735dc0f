"""Exact budgets: how many weights are pruned in total, and integer counts from learned rates that add up to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from besa.counting.precision import widest
from besa.errors import BesaError


@dataclass(frozen=True)
class Budget:
    """Linears of one block, or of two, that share a number of zeros.

    Attributes:
        names: full names of the linears.
        weights: number of their weights.
        zeros: number of these weights that must be zero after pruning.
    """

    names: tuple[str, ...]
    weights: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.weights


def zeros_for(sparsity: float, weights: int) -> int:
    """The number of zeros for a sparsity: round(sparsity × weights), halves to even."""
    return round(sparsity * weights)


def split(total: int, sizes: list[int]) -> list[int]:
    """Split `total` zeros over parts of `sizes` weights in proportion, exactly, by cumulative rounding.

    The first k parts together get round(total × their share of the weights), so that every prefix is within half a
    weight of its share.
    """
    weights, passed, assigned, parts = sum(sizes), 0, 0, []
    for size in sizes:
        passed += size
        upto = (2 * total * passed + weights) // (2 * weights)  # integer rounding: exact for any model size
        parts.append(upto - assigned)
        assigned = upto
    return parts


def apportion(rates_R: Tensor, widths_R: Tensor, total: int, least_R: Tensor) -> Tensor:
    """Integer zeros per row that add up to `total` and change the learned rates least; (R,), int64.

    Minimises Σ_r width_r·(n_r / width_r − rate_r)² over integers least_r ≤ n_r ≤ width_r with Σ n_r = total. The cost
    is convex in each n_r. It is therefore optimal to raise one count at a time, always the cheapest one; of equal ones,
    that of the lower row. A bisection on the price of a step takes all but the last few steps at once. The host waits
    for the device once.

    Args:
        rates_R: learned pruning rate of each row, any real number; the other tensors are on its device.
        widths_R: weights in each row, int64, positive.
        total: zeros to distribute.
        least_R: zeros that each row already has, int64.

    Raises:
        BesaError: `total` is less than the zeros already there, or more than the number of weights.
    """
    rows, dtype = len(rates_R), widest(rates_R.device)
    least, weights = torch.stack([least_R.sum(), widths_R.sum()]).tolist()
    if not least <= total <= weights:
        raise BesaError(
            f"A block of {weights:,} prunable weights has {least:,} zeros already and cannot "
            f"have exactly {total:,}: ask for a sparsity of at least {least / weights:.4f}."
        )
    widths = widths_R.to(dtype)
    ideal = rates_R.to(dtype) * widths

    def counts_at(price: Tensor) -> Tensor:
        # Step n → n+1 costs (2(n − ideal) + 1) / width. It is taken if that is below the price.
        counts = torch.floor(ideal + (price * widths + 1) / 2)
        return torch.minimum(torch.maximum(counts, least_R.to(dtype)), widths)

    high = 2 * (ideal.abs() / widths).max() + 4.0
    low = -high
    for _ in range(64):
        middle = (low + high) / 2
        fits = counts_at(middle).sum() <= total
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    # The price is lowered by half a step, so that the order of rows decides ties, not the rounding of the last price.
    counts = counts_at(low - 0.5 / widths.max())
    cost = torch.where(counts < widths, (2 * (counts - ideal) + 1) / widths, torch.inf)
    more = torch.arange(rows, device=cost.device) < total - counts.sum()  # at most one more step per row
    return counts.scatter_add_(0, cost.argsort(stable=True), more.to(dtype)).long()


def cheapest(costs: Sequence[Sequence[float]], sizes: Sequence[int], total: int) -> list[int] | None:
    """The number of steps of each part with the least total cost, such that Σ steps·size is `total`.

    Exact, by dynamic programming: part by part, it finds the least cost of every sum up to `total`, in units of the
    greatest common divisor of the sizes. Of equal costs, fewer steps of the later part are chosen.

    Args:
        costs: for each part, the cost of 0, 1, 2, … steps together; infinite for numbers not allowed.
        sizes: for each part, the size of a step.
        total: a multiple of the sizes' greatest common divisor.

    Returns:
        The steps of each part; None if no steps add up to `total`.
    """
    divisor = math.gcd(*sizes)
    sums = total // divisor + 1
    least = torch.full((sums,), torch.inf, dtype=torch.float64)
    least[0] = 0.0
    choices = []
    for part_costs, size in zip(costs, sizes, strict=True):
        cost_of = torch.full((len(part_costs), sums), torch.inf, dtype=torch.float64)
        for steps, cost in enumerate(part_costs):
            shift = steps * size // divisor
            cost_of[steps, shift:] = least[: max(0, sums - shift)] + cost
        least, best = cost_of.min(dim=0)
        choices.append(best)
    if not bool(least[-1].isfinite()):
        return None
    place, counts = sums - 1, []
    for best, size in zip(reversed(choices), reversed(sizes), strict=True):
        counts.append(int(best[place]))
        place -= counts[-1] * size // divisor
    return counts[::-1]
