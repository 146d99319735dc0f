"""The kernels of masks.cpp again, for GPUs, in Triton: one program for each row."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

TILE = 8192  # weights × bins that a program holds at a time


@triton.jit  # type: ignore[untyped-decorator]
def _masked(w: Any, ranks: Any, counts: Any, out: Any, columns: Any, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    place = row * columns + at
    kept = tl.load(ranks + place, mask=inside, other=0) >= tl.load(counts + row)
    tl.store(out + place, tl.load(w + place, mask=inside & kept, other=0.0), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _binned(
    gradient: Any,
    w: Any,
    ranks: Any,
    bins: Any,
    out: Any,
    n_bins: Any,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, BINS)
    sums = tl.zeros((BINS,), dtype=tl.float32)
    for left in range(0, COLUMNS, BLOCK):
        at = left + tl.arange(0, BLOCK)
        inside = at < COLUMNS
        place = row * COLUMNS + at
        product = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        product *= tl.load(w + place, mask=inside, other=0.0).to(tl.float32)
        bin = tl.load(bins + tl.load(ranks + place, mask=inside, other=0), mask=inside, other=0).to(tl.int32)
        # Every bin adds from all products. Atomic additions would change their order from run to run.
        sums += tl.sum(tl.where(bin[:, None] == every[None, :], product[:, None], 0.0), axis=0)
    tl.store(out + row * n_bins + every, sums, mask=every < n_bins)


def masked(w_OI: Tensor, ranks_OI: Tensor, counts_O: Tensor, out_OI: Tensor) -> None:
    """See `besa.kernels.masked`."""
    rows, columns = w_OI.shape
    block = min(1024, triton.next_power_of_2(columns))
    _masked[rows, triton.cdiv(columns, block)](w_OI, ranks_OI, counts_O, out_OI, columns, BLOCK=block)


def binned(gradient_OI: Tensor, w_OI: Tensor, ranks_OI: Tensor, bins_I: Tensor, out_OB: Tensor) -> None:
    """See `besa.kernels.binned`."""
    rows, columns = w_OI.shape
    width = triton.next_power_of_2(out_OB.shape[1])
    block = max(1, TILE // width)
    _binned[rows,](
        gradient_OI, w_OI, ranks_OI, bins_I, out_OB, out_OB.shape[1], COLUMNS=columns, BLOCK=block, BINS=width
    )
