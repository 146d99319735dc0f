"""Counts of rows at a common price, in one program, so that the bisection is one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from besa.kernels.gpu.launching import launch
from besa.kernels.reference import PRICE_HALVINGS

ROWS = 2048  # at a time


@triton.jit
def _counts_at(price, ideal, width, least, at, rows):
    of_row = tl.load(width + at, mask=at < rows, other=0.0)
    count = tl.floor(tl.load(ideal + at, mask=at < rows, other=0.0) + (price * of_row + 1) / 2)
    count = tl.maximum(count, tl.load(least + at, mask=at < rows, other=0.0))
    return tl.minimum(count, of_row)


@triton.jit(do_not_specialize=["rows", "total"])
def _cheapest_counts(ideal, width, least, counts, rows, total, HALVINGS: tl.constexpr, BLOCK: tl.constexpr):
    rates = tl.zeros((BLOCK,), dtype=tl.float64)
    widths = tl.zeros((BLOCK,), dtype=tl.float64)
    left = 0
    while left < rows:
        at = left + tl.arange(0, BLOCK)
        of_row = tl.load(width + at, mask=at < rows, other=1.0)
        rates = tl.maximum(rates, tl.abs(tl.load(ideal + at, mask=at < rows, other=0.0)) / of_row)
        widths = tl.maximum(widths, of_row)
        left += BLOCK
    high = 2 * tl.max(rates, axis=0) + 4.0
    low = -high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        sums = tl.zeros((BLOCK,), dtype=tl.float64)
        left = 0
        while left < rows:
            sums += _counts_at(middle, ideal, width, least, left + tl.arange(0, BLOCK), rows)
            left += BLOCK
        fits = tl.sum(sums, axis=0) <= total.to(tl.float64)
        low = tl.where(fits, middle, low)
        high = tl.where(fits, high, middle)
    price = low - 0.5 / tl.max(widths, axis=0)
    left = 0
    while left < rows:
        at = left + tl.arange(0, BLOCK)
        count = _counts_at(price, ideal, width, least, at, rows)
        tl.store(counts + at, count, mask=at < rows)
        left += BLOCK


def cheapest_counts(ideal_R: Tensor, width_R: Tensor, least_R: Tensor, total: int) -> Tensor:
    """See `besa.kernels.cheapest_counts`."""
    counts_R = torch.empty_like(ideal_R)
    arguments = (ideal_R, width_R, least_R, counts_R, len(ideal_R), total)
    launch(_cheapest_counts, (1,), *arguments, HALVINGS=PRICE_HALVINGS, BLOCK=ROWS, num_warps=16)
    return counts_R
