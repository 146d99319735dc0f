"""From pruning rates to counts, in one program, so that the bisection is one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from besa.kernels.gpu.launching import launch
from besa.kernels.reference import HALVINGS, NEARLY

GROUPS = 4096  # of rows, at a time


@triton.jit(do_not_specialize=["groups"])
def _pruned_ranks(
    alpha, width, share, counts, groups, sparsity, HALVINGS: tl.constexpr, NEARLY: tl.constexpr, BLOCK: tl.constexpr
):
    low, high = -1.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        sums = tl.zeros((BLOCK,), dtype=tl.float32)
        left = 0
        while left < groups:
            at = left + tl.arange(0, BLOCK)
            rate = tl.load(alpha + at, mask=at < groups, other=0.0) + middle
            rate = tl.minimum(tl.maximum(rate, 0.0), 1.0)
            sums += rate * tl.load(share + at, mask=at < groups, other=0.0)
            left += BLOCK
        below = tl.sum(sums, axis=0) < sparsity
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    shift = (low + high) / 2
    left = 0
    while left < groups:
        at = left + tl.arange(0, BLOCK)
        rate = tl.load(alpha + at, mask=at < groups, other=0.0) + shift
        rate = tl.minimum(tl.maximum(rate, 0.0), 1.0)
        count = tl.floor(rate.to(tl.float64) * tl.load(width + at, mask=at < groups, other=0.0) + NEARLY)
        tl.store(counts + at, count.to(tl.int64), mask=at < groups)
        left += BLOCK


def pruned_ranks(alpha_R: Tensor, width_R: Tensor, share_R: Tensor, sparsity: float) -> Tensor:
    """See `besa.kernels.pruned_ranks`."""
    counts_R = torch.empty(len(alpha_R), dtype=torch.int64, device=alpha_R.device)
    launch(
        _pruned_ranks,
        (1,),
        alpha_R.contiguous(),
        width_R,
        share_R,
        counts_R,
        len(alpha_R),
        sparsity,
        HALVINGS=HALVINGS,
        NEARLY=NEARLY,
        BLOCK=GROUPS,
        num_warps=16,
    )
    return counts_R
