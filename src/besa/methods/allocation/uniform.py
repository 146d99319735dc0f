"""Uniform: every linear of the block is pruned at the target sparsity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from besa.counting.budget import Budget, apportion, split
from besa.counting.masks import rank
from besa.errors import BesaError
from besa.methods.allocation.allocator import Allocator
from besa.methods.allocation.problem import Allocated, BlockProblem


class Uniform(Allocator):
    """The target for each row (as Wanda does), or for each linear with one threshold over it (as magnitude pruning)."""

    method: Literal["uniform"] = "uniform"
    per: Literal["row", "linear"] = Field(
        default="row", description="what is compared: weights of a row, or of the linear"
    )

    @property
    def sorts_linears(self) -> bool:
        """Whether one threshold goes over a whole linear."""
        return self.per == "linear"

    def allocate(self, problem: BlockProblem) -> Allocated:
        """Zeros of every row, adding up to the budgets.

        Raises:
            BesaError: the block has more zeros already than it is to end with.
        """
        return Allocated({name: counts for budget in problem.budgets for name, counts in self._shares(problem, budget)})

    def _shares(self, problem: BlockProblem, budget: Budget) -> Iterator[tuple[str, Tensor]]:
        """Each linear of the budget with the zeros of its rows."""
        totals = split(budget.zeros, [problem.linears[name].w_OI.numel() for name in budget.names])
        for name, total in zip(budget.names, totals, strict=True):
            linear = problem.linears[name]
            rows, width = linear.w_OI.shape
            if self.per == "row":
                rates = torch.full((rows,), total / (rows * width))
                yield name, apportion(rates, torch.full((rows,), width), total, linear.zeros_O)
                continue
            zeros_now = int(linear.zeros_O.sum())
            if total < zeros_now:
                raise BesaError(
                    f"{name} has {zeros_now:,} zeros already and cannot have only {total:,}: "
                    f"ask for a sparsity of at least {zeros_now / (rows * width):.4f}."
                )
            places = rank(linear.importance_OI.reshape(1, -1), linear.w_OI.reshape(1, -1)).reshape(rows, width)
            yield name, (places < total).sum(dim=1).cpu()
