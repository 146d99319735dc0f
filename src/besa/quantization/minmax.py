"""Min-max quantisation with learnable clipping (eq. 7; OmniQuant, Shao et al., 2024), as pure functions.

Shape suffixes: O rows (output channels), I columns (input channels), G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SMALLEST = 1e-7  # smallest step, for groups of zeros; it is above zero in float16 too


@dataclass(frozen=True)
class Grid:
    """The possible values of a weight: (code − code of zero) × step, one of which is exactly zero.

    Attributes:
        step_OG: h of eq. 7, positive.
        zero_OG: z of eq. 7, the code of zero; integers in [0, 2^N − 1], in the dtype of the steps.
        bits: N.
    """

    step_OG: Tensor
    zero_OG: Tensor
    bits: int

    @property
    def largest(self) -> int:
        """The largest code, 2^N − 1."""
        return int(2**self.bits) - 1

    def to(self, device: torch.device) -> Grid:
        """The grid on a device."""
        return replace(self, step_OG=self.step_OG.to(device), zero_OG=self.zero_OG.to(device))

    def rows(self, rows: slice) -> Grid:
        """The grid of some rows of the weight."""
        return replace(self, step_OG=self.step_OG[rows], zero_OG=self.zero_OG[rows])

    def zeros_OI(self, columns: int, dtype: torch.dtype) -> Tensor:
        """The code of zero of every weight (O, I) of a matrix with so many columns."""
        return self.zero_OG.to(dtype).repeat_interleave(columns // self.zero_OG.shape[1], dim=1)


def extremes(w_OI: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """min(W) and max(W) of eq. 7, of each group of consecutive columns (O, G), float32; zero is always between them."""
    w_OGI = _grouped(w_OI.float(), groups)
    return w_OGI.amin(dim=2).clamp_max(0), w_OGI.amax(dim=2).clamp_min(0)


def grid(low_OG: Tensor, high_OG: Tensor, bits: int, symmetric: bool) -> Grid:
    """The grid between γ0·min(W) and γ1·max(W) (eq. 7), or a symmetric grid that covers both.

    h = (high − low) / (2^N − 1) and z = −round(low / h). If symmetric, both ends are the larger extreme, z = 2^(N−1).

    Args:
        low_OG: γ0·min(W), zero or negative.
        high_OG: γ1·max(W), zero or positive.
        bits: N.
        symmetric: whether the code of zero is the middle one.
    """
    if symmetric:
        high_OG = torch.maximum(high_OG, -low_OG)
        low_OG = -high_OG
    step_OG = ((high_OG - low_OG) / (2**bits - 1)).clamp_min(SMALLEST)
    zero_OG = torch.full_like(step_OG, 2.0 ** (bits - 1)) if symmetric else (-low_OG / step_OG).round()
    return Grid(step_OG, zero_OG, bits)


def clipped_grid(logits_2OG: Tensor, low_OG: Tensor, high_OG: Tensor, bits: int, symmetric: bool) -> Grid:
    """The grid of weights between `low_OG` and `high_OG` (`extremes`), at γ0 and γ1 = sigmoid(logits)."""
    clipped_low_OG, clipped_high_OG = (logits_2OG.sigmoid() * torch.stack([low_OG, high_OG])).unbind()
    return grid(clipped_low_OG, clipped_high_OG, bits, symmetric)


def codes(w_OI: Tensor, grid: Grid) -> Tensor:
    """clamp(round(W / h) + z, 0, 2^N − 1) of eq. 7 (O, I), integers in float32."""
    w_OGI = _grouped(w_OI.float(), grid.step_OG.shape[1])
    codes_OGI = (w_OGI / grid.step_OG[..., None]).round_().add_(grid.zero_OG[..., None]).clamp_(0, grid.largest)
    return codes_OGI.reshape(w_OI.shape)


def kept_codes(w_OI: Tensor, grid: Grid) -> Tensor:
    """`codes` (O, I) of a pruned weight: a zero has the code of zero, and no other weight has it.

    What would round to zero has the next code on its side of zero, or on the other side where the grid ends.
    """
    codes_OI = codes(w_OI, grid)
    zero_OI = grid.zeros_OI(w_OI.shape[1], grid.zero_OG.dtype)
    up_OI = torch.where(w_OI < 0, zero_OI == 0, zero_OI < grid.largest)
    beside_OI = torch.where(up_OI, zero_OI + 1, zero_OI - 1)
    return torch.where(w_OI == 0, zero_OI, torch.where(codes_OI == zero_OI, beside_OI, codes_OI))


def dequantized(codes_OI: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Q(W) = (codes − z)·h of eq. 7 (O, I), multiplied in `dtype`, as programs that load the codes do."""
    codes_OGI = _grouped(codes_OI, grid.step_OG.shape[1])
    whole_OGI = (codes_OGI - grid.zero_OG[..., None]).to(dtype)  # exact: below 2^N
    return (whole_OGI * grid.step_OG[..., None].to(dtype)).reshape(codes_OI.shape)


def step_gradient(gradient_OI: Tensor, w_OI: Tensor, grid: Grid) -> Tensor:
    """dL/dh (O, G) from dL/dQ (O, I), straight through the rounding; no gradient flows through the zero point.

    For Q = (round(W/h) + z − z)·h, dQ/dh is round(W/h) − W/h if the code is not clamped, else the clamped code − z.
    """
    groups = grid.step_OG.shape[1]
    ratio_OGI = _grouped(w_OI.float(), groups) / grid.step_OG[..., None]
    zero_OG1 = grid.zero_OG[..., None]
    free_OGI = ratio_OGI.round() + zero_OG1
    code_OGI = free_OGI.clamp(0, grid.largest)
    slope_OGI = (code_OGI - zero_OG1).sub_(torch.where(free_OGI == code_OGI, ratio_OGI, 0))
    return (_grouped(gradient_OI.float(), groups) * slope_OGI).sum(dim=2)


def logits_gradient(
    slope_OG: Tensor, grid: Grid, logits_2OG: Tensor, low_OG: Tensor, high_OG: Tensor, symmetric: bool
) -> Tensor:
    """dL/dlogits (2, O, G) from dL/dh of the `clipped_grid`; no gradient flows through the zero point.

    A step at its smallest does not change. A symmetric grid follows the larger extreme, or two equal ones by halves.
    """
    gamma_2OG, extremes_2OG = logits_2OG.sigmoid(), torch.stack([low_OG, high_OG])
    slope_OG = torch.where(grid.step_OG > SMALLEST, slope_OG, 0) / grid.largest
    larger_OG = (gamma_2OG * extremes_2OG).sum(dim=0).sign() if symmetric else torch.zeros_like(slope_OG)
    ends_2OG = slope_OG * torch.stack([larger_OG - 1, larger_OG + 1])  # symmetric: -2 and 0, -1 and 1, or 0 and 2
    return ends_2OG * extremes_2OG * (1 - gamma_2OG) * gamma_2OG


def _grouped(x_OI: Tensor, groups: int) -> Tensor:
    return x_OI.reshape(x_OI.shape[0], groups, -1)
