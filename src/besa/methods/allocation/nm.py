"""N:M: every group of consecutive columns of a row keeps the same number of weights.

Shape suffixes: O rows (output channels), I columns (input channels), G groups of a row, M columns of a group, L
linears, P numbers of pruned weights in a group.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from besa.counting.budget import Budget, cheapest
from besa.counting.precision import widest
from besa.methods.allocation.allocator import Allocator
from besa.methods.allocation.problem import Allocated, BlockProblem, RankedLinear
from besa.methods.allocation.sensitivity import Sensitivity


class NM(Allocator):
    """Keep `keep` of every `of` consecutive weights, as hardware for 2:4 sparsity needs it.

    The ranks of the problem order weights by their place within the group (`masks.rank`). The lowest ranks of a row are
    therefore those that the pattern prunes, and patterns need only counts per row.

    If patterns are `mixed`, each linear keeps its own number of weights in a group, from 1 to `of`. The linears of a
    budget together keep as many weights as if all kept `keep`. The numbers that add least to the model's loss
    are chosen, as `Sensitivity` measures it.
    """

    method: Literal["nm"] = "nm"
    keep: int = Field(default=2, ge=1, description="N: weights kept in a group")
    of: int = Field(default=4, ge=2, description="M: consecutive columns of a group")
    mixed: bool = Field(default=False, description="each linear has its own N; the mean over the block is `keep`")
    shaped: ClassVar[bool] = True
    even: ClassVar[bool] = True

    @model_validator(mode="after")
    def _keeps_fewer(self) -> Self:
        if self.keep >= self.of:
            raise ValueError("an n:m pattern must prune something: set allocation.keep below allocation.of")
        return self

    @property
    def only_sparsity(self) -> float:
        """The share that the pattern prunes; for mixed patterns, the mean share."""
        return (self.of - self.keep) / self.of

    @property
    def group(self) -> int:
        """Columns in each group: M."""
        return self.of

    def loss_every(self, samples: int) -> int | None:
        """One sequence in this many, as in `Sensitivity`, if patterns are mixed; else None."""
        return Sensitivity().loss_every(samples) if self.mixed else None

    @property
    def compares_errors(self) -> bool:
        """Whether patterns are mixed: then it compares linears."""
        return self.mixed

    def allocate(self, problem: BlockProblem) -> Allocated:
        """Give every row of a linear the same number of zeros.

        A group that already has more zeros than the pattern keeps them, unless a reconstruction gives them a value.
        """
        pruned = dict.fromkeys(problem.linears, self.of - self.keep)
        if self.mixed:
            for budget in problem.budgets:
                pruned |= self._mix(problem, budget)
        counts = {}
        for name, linear in problem.linears.items():
            rows, width = linear.w_OI.shape
            counts[name] = torch.full((rows,), width // self.of * pruned[name], device=linear.w_OI.device)
        return Allocated(counts)

    def _mix(self, problem: BlockProblem, budget: Budget) -> dict[str, int]:
        """Weights to prune in each group, by linear; empty if no numbers add up to the budget."""
        linears = {name: problem.linears[name] for name in budget.names}
        costs_LP = torch.stack([self._costs(linear, problem.gradients_O(name)) for name, linear in linears.items()])
        sizes = [linear.w_OI.numel() // self.of for linear in linears.values()]
        pruned = cheapest(costs_LP.tolist(), sizes, budget.zeros)
        return {} if pruned is None else dict(zip(linears, pruned, strict=True))

    def _costs(self, linear: RankedLinear, gradients_O: Tensor) -> Tensor:
        """The error of pruning 0, 1, … `of` - 1 weights of every group (P,); infinite for numbers not allowed."""
        dtype = widest(linear.w_OI.device)
        usual = [0.0 if pruned == self.of - self.keep else torch.inf for pruned in range(self.of)]
        usual_P = torch.tensor(usual, dtype=dtype).to(linear.w_OI.device)
        if not linear.reached:
            return usual_P
        error_OI = linear.errors(gradients_O)
        places_OI = linear.ranks_OI // (linear.w_OI.shape[1] // self.of)
        costs = [error_OI.where(places_OI < pruned, 0).sum(dtype=dtype) for pruned in range(self.of)]
        return torch.stack(costs).where(gradients_O.any(), usual_P)  # no token came where gradients were measured
