"""The kernels' computations in plain torch: the reference of their tests, and the fallback without kernels."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 22  # weights at a time, to bound temporary memory


def masked(w_OI: Tensor, ranks_OI: Tensor, counts_O: Tensor, out_OI: Tensor) -> None:
    """See `besa.kernels.masked`."""
    torch.where(ranks_OI >= counts_O[:, None], w_OI, torch.zeros((), dtype=w_OI.dtype, device=w_OI.device), out=out_OI)


def binned(gradient_OI: Tensor, w_OI: Tensor, ranks_OI: Tensor, bins_I: Tensor, out_OB: Tensor) -> None:
    """See `besa.kernels.binned`; the terms of a sum are added in the order of their columns."""
    step = max(1, CHUNK // w_OI.shape[1])
    bins_I = bins_I.long()
    out_OB.zero_()
    for top in range(0, len(w_OI), step):
        part = slice(top, top + step)
        products_OI = gradient_OI[part].float() * w_OI[part].float()
        out_OB[part].scatter_add_(1, bins_I[ranks_OI[part].int()], products_OI)
