"""Magnitude: the smallest weights go first."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from besa.settings import Settings
from besa.statistics import InputStatistics


class Magnitude(Settings):
    """Importance |W|: needs no calibration data."""

    method: Literal["magnitude"] = "magnitude"
    needs_gram: ClassVar[bool] = False
    power: ClassVar[int] = 2

    def score(self, w_OI: Tensor, statistics: InputStatistics) -> Tensor:
        """Importance (O, I), float32, of the weight `w_OI`; the statistics are not looked at."""
        return w_OI.float().abs()
