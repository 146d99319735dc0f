"""RIA: relative importance and activations (Zhang et al., 2024, arXiv 2402.04902).

Shape suffixes: O rows (output channels), I columns (input channels).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from besa.methods.importance.criterion import Criterion
from besa.observing.input_statistics import InputStatistics

TINY = torch.finfo(torch.float32).tiny  # smallest divisor: in a row or column of zeros, every share is zero


class RIA(Criterion):
    """Importance (|W| / Σ|W| of its row + |W| / Σ|W| of its column) · ‖x‖₂ to the power of `exponent`.

    Shares compare weights within a linear. They do not measure errors of its output, so `power` stays None.
    """

    method: Literal["ria"] = "ria"
    exponent: float = Field(default=0.5, ge=0, description="of the norms of input channels: a in the paper")

    def score(self, w_OI: Tensor, statistics: InputStatistics) -> Tensor:
        """Importance (O, I), float32, of the weight `w_OI`, from the squared norms of its input channels.

        A weight that no token reached (an expert never chosen) is scored by its shares alone.
        """
        size_OI = w_OI.float().abs()
        row_O1, column_1I = size_OI.sum(dim=1, keepdim=True), size_OI.sum(dim=0, keepdim=True)
        shares_OI = size_OI / row_O1.clamp_min(TINY) + size_OI / column_1I.clamp_min(TINY)
        if not statistics.reached:
            return shares_OI
        return shares_OI * statistics.squares_I.pow(self.exponent / 2).float()
