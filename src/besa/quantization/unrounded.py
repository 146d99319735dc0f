"""A pruned weight whose numbers may still move, and the grid that they will be rounded to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from besa.quantization.clipping import Quantized
from besa.quantization.minmax import Grid, kept_codes


@dataclass(frozen=True)
class Unrounded:
    """A weight before its rounding.

    Attributes:
        w_OI: in the dtype of the model, zero where it is pruned. No other weight will round to zero.
        grid: with steps that the dtype of the model holds.
        symmetric: whether the code of zero is the middle one.
    """

    w_OI: Tensor
    grid: Grid
    symmetric: bool

    def quantized(self) -> Quantized:
        """The weight as codes."""
        codes_OI = kept_codes(self.w_OI, self.grid).to(torch.uint8)
        return Quantized(codes_OI, self.grid, self.symmetric, self.w_OI.dtype)
