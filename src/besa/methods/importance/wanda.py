"""Wanda: a weight is as important as the norm of its term in the output (BESA eq. 2; Sun et al., 2023)."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from besa.methods.importance.criterion import Criterion
from besa.observing.input_statistics import InputStatistics


class Wanda(Criterion):
    """Importance |W|·‖x‖₂, the norm of each input channel taken over all calibration tokens."""

    method: Literal["wanda"] = "wanda"
    power: ClassVar[int | None] = 2

    def score(self, w_OI: Tensor, statistics: InputStatistics) -> Tensor:
        """Importance (O, I), float32, of the weight `w_OI`, from the squared norms of its input channels.

        A weight that no token reached (an expert never chosen) is scored by its magnitude.
        """
        if not statistics.reached:
            return w_OI.float().abs()
        return w_OI.float().abs() * statistics.squares_I.sqrt().float()
