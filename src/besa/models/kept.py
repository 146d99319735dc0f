"""What a mask keeps of a weight, as a vector that learns: half of the memory at 50 %, for gradients and moments too.

Shape suffixes: O rows, I columns, K kept weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from besa import kernels


def kept_of(w_OI: Tensor, x_OI: Tensor | None = None, count: int | None = None) -> Tensor:
    """The numbers of X (K,), float32, that stand where W is not zero, row by row.

    Args:
        w_OI: the weight.
        x_OI: in the dtype of W; by default W itself.
        count: K if it is known. To count them, the host waits for the device.
    """
    w_OI = w_OI.contiguous()
    kept_K = torch.empty(int(torch.count_nonzero(w_OI)) if count is None else count, device=w_OI.device)
    kernels.gathered(w_OI, w_OI if x_OI is None else x_OI.contiguous(), kept_K)
    return kept_K


def spread(kept_K: Tensor, w_OI: Tensor) -> Tensor:
    """The matrix (O, I) in the dtype of W that has the kept numbers where W is not zero; differentiable by them."""
    spread_OI: Tensor = _Spread.apply(kept_K, w_OI.contiguous())  # type: ignore[no-untyped-call]  # torch's
    return spread_OI


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kept_K: Tensor, w_OI: Tensor) -> Tensor:
        ctx.save_for_backward(w_OI)
        ctx.kept = len(kept_K)
        out_OI = torch.empty_like(w_OI)
        kernels.spread(w_OI, kept_K.contiguous(), out_OI)
        return out_OI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_OI: Tensor) -> tuple[Tensor, None]:
        (w_OI,) = ctx.saved_tensors
        gradient_K = gradient_OI.new_empty(ctx.kept, dtype=torch.float32)
        kernels.gathered(w_OI, gradient_OI.contiguous(), gradient_K)
        return gradient_K, None
