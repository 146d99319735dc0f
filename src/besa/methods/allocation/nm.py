"""N:M: in every group of consecutive columns of a row the same number of weights is kept.

Shape suffixes: O rows (output channels), I columns (input channels), G groups of a row, M columns of a group.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from besa.counting.budget import Budget, cheapest
from besa.methods.allocation.allocator import Allocator
from besa.methods.allocation.problem import Allocated, BlockProblem, RankedLinear
from besa.methods.allocation.sensitivity import Sensitivity, row_sensitivities
from besa.observing.probes import RowSensitivities


class NM(Allocator):
    """Keep `keep` of each `of` consecutive weights, as 2:4 hardware wants it.

    The ranks that a block's problem comes with put a weight's place within its group first (`masks.rank`), so that the
    lowest ranks of a row are those the pattern takes, and whatever works with counts works with patterns.

    Where patterns are `mixed`, each linear keeps a number of its own, from 1 to `of`, and the linears of a budget
    together as many weights as if all kept `keep`. Of all such numbers those are taken that make the least error at the
    block's output, as `Sensitivity` counts it.
    """

    method: Literal["nm"] = "nm"
    keep: int = Field(default=2, ge=1, description="N: weights kept in a group")
    of: int = Field(default=4, ge=2, description="M: consecutive columns of a group")
    mixed: bool = Field(default=False, description="each linear has an N of its own, `keep` in the mean of the block")
    shaped: ClassVar[bool] = True

    @model_validator(mode="after")
    def _keeps_fewer(self) -> Self:
        if self.keep >= self.of:
            raise ValueError("an n:m pattern keeps fewer than it is of: set allocation.keep below allocation.of")
        return self

    @property
    def only_sparsity(self) -> float:
        """The share that the pattern prunes; mixed patterns prune it in the mean."""
        return 1 - self.keep / self.of

    @property
    def group(self) -> int:
        """M."""
        return self.of

    @property
    def probes_every(self) -> int | None:
        """As `Sensitivity`, where patterns are mixed."""
        return Sensitivity().every if self.mixed else None

    @property
    def compares_errors(self) -> bool:
        """Between linears, where patterns are mixed."""
        return self.mixed

    def allocate(self, problem: BlockProblem) -> Allocated:
        """The same zeros for every row of a linear.

        A group with more zeros than the pattern makes keeps them, unless a reconstruction finds a use for the place.
        """
        gone = dict.fromkeys(problem.linears, self.of - self.keep)
        if self.mixed:
            found = row_sensitivities(problem, Sensitivity().every)
            for budget in problem.budgets:
                gone |= self._mix(problem, budget, found)
        counts = {}
        for name, linear in problem.linears.items():
            rows, width = linear.w_OI.shape
            counts[name] = torch.full((rows,), width // self.of * gone[name])
        return Allocated(counts)

    def _mix(self, problem: BlockProblem, budget: Budget, found: RowSensitivities) -> dict[str, int]:
        """Weights that go from each group of each linear; none where no such numbers add up to the budget."""
        linears = [problem.linears[name] for name in budget.names]
        costs = [self._costs(own, found.rows(name)) for name, own in zip(budget.names, linears, strict=True)]
        gone = cheapest(costs, [own.w_OI.numel() // self.of for own in linears], budget.zeros)
        return {} if gone is None else dict(zip(budget.names, gone, strict=True))

    def _costs(self, linear: RankedLinear, gradients_O: Tensor) -> list[float]:
        """The error that is made where 0, 1, … `of` - 1 weights of every group go; infinite where they cannot."""
        if not linear.reached:
            return [0.0 if gone == self.of - self.keep else torch.inf for gone in range(self.of)]
        error_OI = linear.errors(gradients_O)
        places_OI = linear.ranks_OI // (linear.w_OI.shape[1] // self.of)
        return [float(error_OI.where(places_OI < gone, 0).sum(dtype=torch.float64)) for gone in range(self.of)]
