"""Exact budgets: how many weights go in total, and how learned rates become integers that add up to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from besa.errors import BesaError


@dataclass(frozen=True)
class Budget:
    """Linears of one block, or of two, that share a number of zeros.

    Attributes:
        names: of the linears.
        weights: how many they have together.
        zeros: how many of these are to be zero in the end.
    """

    names: tuple[str, ...]
    weights: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.weights


def zeros_for(sparsity: float, weights: int) -> int:
    """round(sparsity × weights), halves to even: the number of zeros asked for."""
    return round(sparsity * weights)


def split(total: int, sizes: list[int]) -> list[int]:
    """Split `total` zeros over parts of `sizes` weights in proportion, exactly, by cumulative rounding.

    Part k ends where round(total × share of the first k parts) says: any prefix is within half a weight of its share.
    """
    whole, seen, given, parts = sum(sizes), 0, 0, []
    for size in sizes:
        seen += size
        upto = (2 * total * seen + whole) // (2 * whole)  # integer rounding: exact for any model size
        parts.append(upto - given)
        given = upto
    return parts


def apportion(rates_R: Tensor, widths_R: Tensor, total: int, least_R: Tensor) -> Tensor:
    """Integer zeros per row that add up to `total` and change the learned rates least; (R,), int64.

    Minimises Σ_r width_r·(n_r / width_r − rate_r)² over integers least_r ≤ n_r ≤ width_r with Σ n_r = total. The cost
    is convex in each n_r, so raising one count at a time, always where that costs least, is optimal; ties fall to the
    lower row. All but the last few steps are taken at once by bisecting on the price of a step.

    Args:
        rates_R: wanted pruning rate of each row, any real numbers.
        widths_R: weights in each row, int64, positive.
        total: zeros to hand out.
        least_R: zeros a row has already and cannot lose, int64.

    Raises:
        BesaError: `total` is below the zeros that are there already, or above the number of weights.
    """
    if not int(least_R.sum()) <= total <= int(widths_R.sum()):
        raise BesaError(
            f"A block of {int(widths_R.sum()):,} prunable weights has {int(least_R.sum()):,} zeros already and cannot "
            f"have exactly {total:,}: ask for a sparsity of at least {int(least_R.sum()) / int(widths_R.sum()):.4f}."
        )
    widths = widths_R.double()
    wanted = rates_R.double() * widths

    def counts_at(price: float) -> Tensor:
        # Step n → n+1 costs (2(n − wanted) + 1) / width: taken while that is below the price.
        counts = torch.floor(wanted + (price * widths + 1) / 2)
        return torch.minimum(torch.maximum(counts, least_R.double()), widths)

    reach = 2 * float((wanted.abs() / widths).max()) + 4.0
    low, high = -reach, reach
    for _ in range(64):
        middle = (low + high) / 2
        if int(counts_at(middle).sum()) <= total:
            low = middle
        else:
            high = middle
    # From half a step lower on, ties are settled in the order of rows and not by the rounding of the last price.
    counts = counts_at(low - 0.5 / float(widths.max()))
    cost = torch.where(counts < widths, (2 * (counts - wanted) + 1) / widths, torch.inf)
    counts[cost.argsort(stable=True)[: total - int(counts.sum())]] += 1  # at most one step a row is left
    return counts.long()


def cheapest(costs: Sequence[Sequence[float]], sizes: Sequence[int], total: int) -> list[int] | None:
    """How many steps each part takes, so that Σ steps·size is `total` and the costs add up to the least.

    Exact: part by part, the least that every sum up to `total` can cost is found; sums are counted in the
    greatest common divisor of the sizes. Ties fall to fewer steps of the later part.

    Args:
        costs: of each part, what 0, 1, 2, … steps cost together; infinite where they are not to be had.
        sizes: of a step of each part.
        total: a multiple of the sizes' greatest common divisor.

    Returns:
        None where no steps add up to `total`.
    """
    unit = math.gcd(*sizes)
    room = total // unit + 1
    least = torch.full((room,), torch.inf, dtype=torch.float64)
    least[0] = 0.0
    taken = []
    for own, size in zip(costs, sizes, strict=True):
        tried = torch.full((len(own), room), torch.inf, dtype=torch.float64)
        for steps, cost in enumerate(own):
            way = steps * size // unit
            tried[steps, way:] = least[: max(0, room - way)] + cost
        least, best = tried.min(dim=0)
        taken.append(best)
    if not bool(least[-1].isfinite()):
        return None
    place, counts = room - 1, []
    for best, size in zip(reversed(taken), reversed(sizes), strict=True):
        counts.append(int(best[place]))
        place -= counts[-1] * size // unit
    return counts[::-1]
