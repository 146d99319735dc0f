"""Uniform: every linear of the block is pruned at the target sparsity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from besa.counting.budget import Budget, enough_for, split
from besa.counting.masks import rank
from besa.errors import BesaError
from besa.methods.allocation.allocator import Allocator
from besa.methods.allocation.problem import Allocated, BlockProblem
from besa.methods.apportioning import apportion


class Uniform(Allocator):
    """The target sparsity for each row (as Wanda), or for each linear with one threshold (as magnitude pruning)."""

    method: Literal["uniform"] = "uniform"
    per: Literal["row", "linear"] = Field(
        default="row", description="whether the weights of a row compete, or those of a linear"
    )

    @property
    def sorts_linears(self) -> bool:
        """Whether a linear has one threshold."""
        return self.per == "linear"

    def allocate(self, problem: BlockProblem) -> Allocated:
        """The zeros of every row. They add up to the budgets.

        Raises:
            BesaError: the block already has more zeros than its budget.
        """
        return Allocated({name: counts for budget in problem.budgets for name, counts in self._shares(problem, budget)})

    def _shares(self, problem: BlockProblem, budget: Budget) -> Iterator[tuple[str, Tensor]]:
        """The full name of each linear of the budget and the zeros of its rows (O,)."""
        totals = split(budget.zeros, [problem.linears[name].w_OI.numel() for name in budget.names])
        for name, total in zip(budget.names, totals, strict=True):
            linear = problem.linears[name]
            rows, width = linear.w_OI.shape
            if self.per == "row":
                zeros_O = linear.zeros_O
                rates_O = torch.full_like(zeros_O, total / (rows * width), dtype=torch.float32)
                yield name, apportion(rates_O, torch.full_like(zeros_O, width), total, zeros_O)
                continue
            zeros_now = int(linear.zeros_O.sum())
            if total < zeros_now:
                raise BesaError(
                    f"{name} has {zeros_now:,} zeros already and cannot have only {total:,}: "
                    f"ask for a sparsity of at least {enough_for(zeros_now, rows * width)}."
                )
            places = rank(linear.importance_OI.reshape(1, -1), linear.w_OI.reshape(1, -1)).reshape(rows, width)
            yield name, (places < total).sum(dim=1)
