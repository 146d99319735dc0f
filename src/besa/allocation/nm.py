"""N:M: in every group of consecutive columns of a row the same number of weights is kept."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from besa.allocation.problem import Allocated, BlockProblem
from besa.errors import BesaError
from besa.settings import Settings


class NM(Settings):
    """Keep `keep` of each `of` consecutive weights, as 2:4 hardware wants it.

    The ranks that a block's problem comes with put a weight's place within its group first (`masks.rank`), so that the
    lowest ranks of a row are those the pattern takes, and whatever works with counts works with patterns.
    """

    method: Literal["nm"] = "nm"
    keep: int = Field(default=2, ge=1, description="N: weights kept in a group")
    of: int = Field(default=4, ge=2, description="M: consecutive columns of a group")

    @property
    def sparsity(self) -> float:
        """What the pattern leaves no choice about."""
        return 1 - self.keep / self.of

    def allocate(self, problem: BlockProblem) -> Allocated:
        """The same zeros for every row.

        Raises:
            BesaError: a group has more zeros already than the pattern makes.
        """
        counts = {}
        for name, linear in problem.linears.items():
            rows, width = linear.w_OI.shape
            zeros_OG = (linear.w_OI == 0).reshape(rows, -1, self.of).sum(dim=2)
            if int(zeros_OG.max()) > self.of - self.keep:
                raise BesaError(
                    f"{name} has groups of {self.of} with more than {self.of - self.keep} zeros already: "
                    "leave it out with --skip, or prune without a pattern."
                )
            counts[name] = torch.full((rows,), width // self.of * (self.of - self.keep))
        return Allocated(counts)
