"""Clipping: the share of a weight's range that its grid covers, learned (gamma of eq. 7) or all of it.

Shape suffixes: O rows, I columns, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from besa.quantization.minmax import Grid, clipped_grid, codes, dequantized, extremes

START = 4.0  # logit of gamma at the start, as in OmniQuant: gamma is 0.98


class Clipping:
    """γ0 and γ1 of one weight, for each row or group, as logits (2, O, G) that a descent can learn.

    Args:
        w_OI: the weight.
        groups: number of groups of consecutive columns in a row.
        bits: N.
        symmetric: whether the code of zero is the middle one.
        learned: whether γ is learned, from 0.98; else it is 1.

    Attributes:
        logits_2OG: what a descent learns; `kernels.quantized` and `kernels.clipping_gradient` serve it.
        low_OG: min(W) of each group.
        high_OG: max(W) of each group.
    """

    def __init__(self, w_OI: Tensor, groups: int, bits: int, symmetric: bool, learned: bool) -> None:
        self.w_OI, self.bits, self.symmetric = w_OI, bits, symmetric
        self.low_OG, self.high_OG = extremes(w_OI, groups)
        start = START if learned else torch.inf
        self.logits_2OG = torch.full((2, *self.low_OG.shape), start, device=w_OI.device, requires_grad=learned)

    @torch.no_grad()
    def quantized(self, dtype: torch.dtype) -> Quantized:
        """The weight on its final grid; its steps are rounded to `dtype`."""
        exact = clipped_grid(self.logits_2OG, self.low_OG, self.high_OG, self.bits, self.symmetric)
        rounded = replace(exact, step_OG=exact.step_OG.to(dtype).float())
        return Quantized(codes(self.w_OI, rounded).to(torch.uint8), rounded, self.symmetric, dtype)


@dataclass(frozen=True)
class Quantized:
    """A weight as codes on a grid.

    Attributes:
        codes_OI: in [0, 2^N − 1], uint8.
        grid: of the codes.
        symmetric: whether the code of zero is the middle one.
        dtype: of the weight.
    """

    codes_OI: Tensor
    grid: Grid
    symmetric: bool
    dtype: torch.dtype

    def weight(self) -> Tensor:
        """Q(W) (O, I)."""
        return dequantized(self.codes_OI, self.grid, self.dtype)

    def pruned(self, kept_OI: Tensor) -> Quantized:
        """The weight with the code of zero, an exact zero, wherever `kept_OI` is False."""
        return replace(self, codes_OI=torch.where(kept_OI, self.codes_OI, self.zeros_OI()))

    def zeros_OI(self) -> Tensor:
        """The code of zero of every weight (O, I), uint8."""
        return self.grid.zeros_OI(self.codes_OI.shape[1], torch.uint8)
