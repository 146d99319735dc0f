"""Uniform: every linear of the block is pruned at the target sparsity."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from besa.allocation.problem import Allocated, BlockProblem
from besa.budget import apportion, split
from besa.errors import BesaError
from besa.masks import rank
from besa.settings import Settings


class Uniform(Settings):
    """The target for each row (as Wanda does), or for each linear with one threshold over it (as magnitude pruning)."""

    method: Literal["uniform"] = "uniform"
    per: Literal["row", "linear"] = Field(
        default="row", description="what is compared: weights of a row, or of the linear"
    )
    teacher: ClassVar[None] = None  # nothing is learned

    def allocate(self, problem: BlockProblem) -> Allocated:
        """Zeros of every row, adding up to the problem's.

        Raises:
            BesaError: the block has more zeros already than it is to end with.
        """
        linears = problem.linears
        totals = split(problem.zeros, [linear.w_OI.numel() for linear in linears.values()])
        counts = {}
        for total, (name, linear) in zip(totals, linears.items(), strict=True):
            rows, width = linear.w_OI.shape
            if self.per == "row":
                rates = torch.full((rows,), total / (rows * width))
                counts[name] = apportion(rates, torch.full((rows,), width), total, linear.zeros_O)
            else:
                zeros_now = int(linear.zeros_O.sum())
                if total < zeros_now:
                    raise BesaError(
                        f"{name} has {zeros_now:,} zeros already and cannot have only {total:,}: "
                        f"ask for a sparsity of at least {zeros_now / (rows * width):.4f}."
                    )
                places = rank(linear.importance_OI.reshape(1, -1), linear.w_OI.reshape(1, -1)).reshape(rows, width)
                counts[name] = (places < total).sum(dim=1).cpu()
        return Allocated(counts)
