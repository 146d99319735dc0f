"""Magnitude: the smallest weights are pruned first."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from besa.methods.importance.criterion import Criterion
from besa.observing.input_statistics import InputStatistics


class Magnitude(Criterion):
    """Importance |W|: needs no calibration data. Its square is the output error of independent inputs of norm 1."""

    method: Literal["magnitude"] = "magnitude"
    needs_inputs: ClassVar[bool] = False
    power: ClassVar[int | None] = 2

    def score(self, w_OI: Tensor, statistics: InputStatistics) -> Tensor:
        """Importance (O, I), float32, of the weight `w_OI`; the statistics are not used."""
        return w_OI.float().abs()
