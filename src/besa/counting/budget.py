"""Exact budgets: how many weights are pruned in total, and whole numbers of steps that add up to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

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


def enough_for(zeros: int, weights: int) -> str:
    """A share of zeros in four digits, rounded up, so that `zeros_for` of it gives at least so many."""
    return f"{-(-10_000 * zeros // weights) / 10_000:.4f}"


def check_room(weights: int, zeros: int, present: int, what: str = "that share a budget") -> None:
    """Check that weights can have so many zeros.

    Args:
        weights: how many there are.
        zeros: that they are to have.
        present: zeros among them already.
        what: which weights they are.

    Raises:
        BesaError: there are more zeros already, or fewer weights.
    """
    if not present <= zeros <= weights:
        share = enough_for(present, weights)
        more = f"ask for a sparsity of at least {share}" if float(share) < 1 else "leave them out by --skip"
        raise BesaError(
            f"{weights:,} weights {what} have {present:,} zeros already and cannot have exactly {zeros:,}: {more}."
        )


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
