"""Masks from ranks: who is pruned first, the hard mask, and the gradient that goes through it.

Shape suffixes: O rows (output channels), I columns (input channels), D candidate pruning rates, R rate groups
(O when each row has rates of its own, 1 when the whole linear shares them).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 22  # weights ranked at a time: bounds the 8-byte sort keys to 32 MiB


def rank(importance_OI: Tensor, w_OI: Tensor) -> Tensor:
    """Rank of each weight within its row, 0 = pruned first; (O, I), int16 where the width allows, else int32.

    Weights that are zero already come first, then ascending importance; ties fall to the lower column. The order is
    the same on every machine because each weight sorts by one integer: importance bits above, column below.

    Args:
        importance_OI: non-negative float32 importance.
        w_OI: the weight the importance was taken of.
    """
    rows, width = importance_OI.shape
    dtype = torch.int16 if width <= torch.iinfo(torch.int16).max else torch.int32
    ranks_OI = torch.empty(rows, width, dtype=dtype, device=w_OI.device)
    positions_I = torch.arange(width, dtype=dtype, device=w_OI.device)
    step = max(1, CHUNK // width)
    for top in range(0, rows, step):
        part = slice(top, top + step)
        order = _order(importance_OI[part], w_OI[part])
        ranks_OI[part].scatter_(1, order, positions_I.expand(order.shape[0], -1))
    return ranks_OI


def _order(importance_OI: Tensor, w_OI: Tensor) -> Tensor:
    """Columns (O, I), int64, of each row in the order in which they are pruned."""
    # Non-negative floats sort like their bits; + 1 leaves 0 to the weights that are zero already.
    bits_OI = (importance_OI.float().contiguous().view(torch.int32).long() + 1).masked_fill(w_OI == 0, 0)
    keys_OI = (bits_OI << 32) | torch.arange(w_OI.shape[1], device=w_OI.device)
    if keys_OI.device.type == "cpu":  # numpy's vectorised integer sort is ~20 times torch's here
        keys_OI = torch.from_numpy(np.sort(keys_OI.numpy(), axis=1))
    else:
        keys_OI = keys_OI.sort(dim=1).values
    return keys_OI & 0xFFFFFFFF


def hard_mask(ranks_OI: Tensor, counts_O: Tensor) -> Tensor:
    """Boolean mask (O, I), True = kept, that prunes the `counts_O[o]` lowest ranks of row o."""
    return ranks_OI >= counts_O.to(ranks_OI.dtype)[:, None]


def candidate_ranks(rates_D: Tensor, width: int) -> Tensor:
    """How many ranks of a row of `width` weights each candidate pruning rate takes, ⌈p_d·I⌉; (D,), int64.

    Eq. 4 prunes rank j (from 0) at candidate d where j < p_d·I. Products within 1e-6 of an integer are that integer,
    so that 0.07 × 100 is 7 ranks and not 8; that takes float64 rates.
    """
    return (rates_D * width - 1e-6).ceil().long().clamp_(0, width)


def straight_through(beta_RD: Tensor, w_OI: Tensor, ranks_OI: Tensor, counts_O: Tensor, taken_ID: Tensor) -> Tensor:
    """Masked weight W ⊙ M (O, I), whose gradient reaches beta as if the mask were 1 − its pruning probability (eq. 6).

    Args:
        beta_RD: simplex coefficients of eq. 3, float32, R = O or 1.
        w_OI: the dense weight, constant.
        ranks_OI: `rank` of the weight.
        counts_O: how many ranks of each row the hard mask prunes.
        taken_ID: 1.0 where candidate d prunes rank j (eq. 4's condition), the same for every row.
    """
    masked_OI: Tensor = _StraightThrough.apply(  # type: ignore[no-untyped-call]  # torch leaves `apply` untyped
        beta_RD, w_OI, ranks_OI, counts_O, taken_ID
    )
    return masked_OI


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, beta_RD: Tensor, w_OI: Tensor, ranks_OI: Tensor, counts_O: Tensor, taken_ID: Tensor
    ) -> Tensor:
        ctx.save_for_backward(w_OI, ranks_OI, taken_ID)
        ctx.shared = beta_RD.shape[0] == 1
        return w_OI * hard_mask(ranks_OI, counts_O)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # dL/dbeta_d = −Σ_j dL/dM_j · [candidate d prunes rank j]: a sum over ranks, no mask-sized probability is built.
        w_OI, ranks_OI, taken_ID = ctx.saved_tensors
        rows, width = w_OI.shape
        dbeta_OD = torch.empty(rows, taken_ID.shape[1], device=w_OI.device)
        step = max(1, CHUNK // width)
        for top in range(0, rows, step):
            part = slice(top, top + step)
            dmask_OI = (gradients[0][part] * w_OI[part]).float()
            by_rank_OI = torch.empty_like(dmask_OI).scatter_(1, ranks_OI[part].long(), dmask_OI)
            torch.matmul(by_rank_OI, taken_ID, out=dbeta_OD[part])
        return -(dbeta_OD.sum(dim=0, keepdim=True) if ctx.shared else dbeta_OD), None, None, None, None
