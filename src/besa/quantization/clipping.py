"""Clipping: the share of a weight's range that its grid covers, learned (gamma of eq. 7) or all of it.

Shape suffixes: O rows, I columns, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from besa.quantization.minmax import Grid, codes, dequantized, extremes, grid, step_gradient

START = 4.0  # logit of gamma at the start, as in OmniQuant: gamma is 0.98


class Clipping:
    """γ0 and γ1 of one weight, for each row or group, as logits (2, O, G) that a descent can learn.

    Args:
        w_OI: the weight.
        groups: number of groups of consecutive columns in a row.
        bits: N.
        symmetric: whether the code of zero is the middle one.
        learned: whether γ is learned, from 0.98; else it is 1.
    """

    def __init__(self, w_OI: Tensor, groups: int, bits: int, symmetric: bool, learned: bool) -> None:
        self._w_OI = w_OI
        self._low_OG, self._high_OG = extremes(w_OI, groups)
        self._bits, self._symmetric = bits, symmetric
        start = START if learned else torch.inf
        self.logits_2OG = torch.full((2, *self._low_OG.shape), start, device=w_OI.device, requires_grad=learned)
        self._grid: Grid | None = None

    def grid(self) -> Grid:
        """The present grid; gradients reach the logits through its steps."""
        low_OG, high_OG = (self.logits_2OG.sigmoid() * torch.stack([self._low_OG, self._high_OG])).unbind()
        return grid(low_OG, high_OG, self._bits, self._symmetric)

    def quantize(self, out_OI: Tensor) -> None:
        """Write Q(W) (O, I) to `out_OI`, and keep the grid for `backward`."""
        with torch.enable_grad():
            self._grid = self.grid()
        with torch.no_grad():
            out_OI.copy_(dequantized(codes(self._w_OI, self._grid), self._grid, out_OI.dtype))

    def backward(self, gradient_OI: Tensor) -> None:
        """Add to the logits' gradient, from dL/dQ (O, I) at the last `quantize`, which is zero for pruned weights."""
        assert self._grid is not None
        with torch.no_grad():
            slope_OG = step_gradient(gradient_OI, self._w_OI, self._grid)
        self._grid.step_OG.backward(slope_OG)

    @torch.no_grad()
    def quantized(self, dtype: torch.dtype) -> Quantized:
        """The weight on its final grid; its steps are rounded to `dtype`."""
        exact = self.grid()
        rounded = replace(exact, step_OG=exact.step_OG.to(dtype).float())
        return Quantized(codes(self._w_OI, rounded).to(torch.uint8), rounded, self._symmetric, dtype)


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
        zero_OI = self.grid.zero_OG.repeat_interleave(self.codes_OI.shape[1] // self.grid.zero_OG.shape[1], dim=1)
        return replace(self, codes_OI=torch.where(kept_OI, self.codes_OI, zero_OI.to(torch.uint8)))
