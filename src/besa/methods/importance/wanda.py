"""Wanda: a weight is as important as the norm of its term in the output (BESA eq. 2).

Source: Sun et al., 2023, arXiv 2306.11695.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from besa.methods.importance.criterion import Criterion
from besa.observing.input_statistics import InputStatistics


class Wanda(Criterion):
    """Importance |W|·‖x‖₂, the norm of each input channel taken over the calibration tokens."""

    method: Literal["wanda"] = "wanda"
    statistics_every: int = Field(
        default=1,
        ge=1,
        description="norms are taken on one sequence in so many; on all for models with experts or with a Gram matrix",
    )
    power: ClassVar[int | None] = 2

    @property
    def every(self) -> int:
        """One sequence in how many the norms are taken on."""
        return self.statistics_every

    def score(self, w_OI: Tensor, statistics: InputStatistics) -> Tensor:
        """Importance (O, I), float32, of the weight `w_OI`, from the squared norms of its input channels.

        A weight that no token reached (an expert never chosen) is scored by its magnitude.
        """
        if not statistics.reached:
            return w_OI.float().abs()
        return w_OI.float().abs() * statistics.squares_I.sqrt().float()
