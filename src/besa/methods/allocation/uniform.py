"""Uniform: every linear of the block is pruned at the target sparsity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from besa.counting.budget import Budget, check_room, split
from besa.counting.masks import rank
from besa.methods.allocation.allocator import Allocator
from besa.methods.allocation.problem import Allocated, BlockProblem, RankedLinear
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
        sizes = {name: linear.w_OI.numel() for name, linear in problem.linears.items()}
        return Allocated(
            {
                name: self._counts(problem.linears[name], total)
                for budget in problem.budgets
                for (name,), total in self.shares(budget, sizes)
            }
        )

    def shares(self, budget: Budget, sizes: Mapping[str, int]) -> Iterator[tuple[tuple[str, ...], int]]:
        """Each linear alone, in proportion to its weights."""
        for name, zeros in zip(budget.names, split(budget.zeros, [sizes[name] for name in budget.names]), strict=True):
            yield (name,), zeros

    def _counts(self, linear: RankedLinear, total: int) -> Tensor:
        """The zeros of the rows of a linear (O,), which has `total`."""
        rows, width = linear.w_OI.shape
        zeros_O = linear.zeros_O
        if self.per == "row":
            rates_O = torch.full_like(zeros_O, total / (rows * width), dtype=torch.float32)
            return apportion(rates_O, torch.full_like(zeros_O, width), total, zeros_O)
        check_room(rows * width, total, int(zeros_O.sum()))
        places = rank(linear.importance_OI.reshape(1, -1), linear.w_OI.reshape(1, -1)).reshape(rows, width)
        return (places < total).sum(dim=1)
