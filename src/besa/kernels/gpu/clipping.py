"""Quantisation with learned clipping (eq. 7), and the gradient of its logits.

A group of columns lies in one piece of memory. The kernels therefore see a matrix of groups × columns of a group, and
take a tile of it at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from besa.kernels.gpu.launching import launch
from besa.quantization.minmax import SMALLEST

COLUMNS = 1024  # of a group, in a tile
GROUPS = 64  # at most, in a tile
TILE = 1024  # weights


@triton.jit
def _rounded(x):
    """The nearest integer, halves to even: numbers between 2^23 and 2^24 have no fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _grid(low, high, LARGEST: tl.constexpr, SYMMETRIC: tl.constexpr, SMALLEST: tl.constexpr):
    """The step of a grid from `low` to `high`, and the code of zero."""
    if SYMMETRIC:
        high = tl.maximum(high, -low)
        low = -high
    largest = tl.zeros_like(low) + LARGEST
    step = tl.maximum(tl.div_rn(high - low, largest), SMALLEST)
    zero = tl.zeros_like(low) + (LARGEST + 1) // 2 if SYMMETRIC else _rounded(tl.div_rn(-low, step))
    return step, zero


@triton.jit
def _quantized(
    w,
    logits,
    low,
    high,
    out,
    groups,
    size,
    LARGEST: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SMALLEST: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    there = group < groups
    of_low = tl.sigmoid(tl.load(logits + group, mask=there, other=0.0))
    of_high = tl.sigmoid(tl.load(logits + groups + group, mask=there, other=0.0))
    low = of_low * tl.load(low + group, mask=there, other=0.0)
    high = of_high * tl.load(high + group, mask=there, other=0.0)
    step, zero = _grid(low, high, LARGEST, SYMMETRIC, SMALLEST)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = there[:, None] & (at < size)[None, :]
    place = group.to(tl.int64)[:, None] * size + at[None, :]
    values = tl.load(w + place, mask=inside, other=0.0).to(tl.float32)
    ratio = tl.div_rn(values, tl.broadcast_to(step[:, None], values.shape))
    code = tl.minimum(tl.maximum(_rounded(ratio) + zero[:, None], 0.0), LARGEST)
    # The product of two numbers in half precision is exact in float32, so it is rounded once.
    of_dtype = step.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + place, ((code - zero[:, None]) * of_dtype[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _clipping_gradient(
    gradient,
    w,
    logits,
    low,
    high,
    out,
    groups,
    size,
    LARGEST: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SMALLEST: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    there = group < groups
    of_low = tl.sigmoid(tl.load(logits + group, mask=there, other=0.0))
    of_high = tl.sigmoid(tl.load(logits + groups + group, mask=there, other=0.0))
    low = tl.load(low + group, mask=there, other=0.0)
    high = tl.load(high + group, mask=there, other=0.0)
    step, zero = _grid(of_low * low, of_high * high, LARGEST, SYMMETRIC, SMALLEST)
    sums = tl.zeros((GROUPS, BLOCK), dtype=tl.float32)
    left = 0
    while left < size:
        at = left + tl.arange(0, BLOCK)
        inside = there[:, None] & (at < size)[None, :]
        place = group.to(tl.int64)[:, None] * size + at[None, :]
        values = tl.load(w + place, mask=inside, other=0.0).to(tl.float32)
        ratio = tl.div_rn(values, tl.broadcast_to(step[:, None], values.shape))
        free = _rounded(ratio) + zero[:, None]
        code = tl.minimum(tl.maximum(free, 0.0), LARGEST)
        slope = (code - zero[:, None]) - tl.where(free == code, ratio, 0.0)
        sums += tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32) * slope
        left += BLOCK
    slope = tl.where(step > SMALLEST, tl.sum(sums, axis=1), 0.0) / LARGEST
    larger = tl.zeros_like(slope)
    if SYMMETRIC:
        larger = tl.where(of_high * high > -of_low * low, 1.0, tl.where(of_high * high < -of_low * low, -1.0, 0.0))
    tl.store(out + group, slope * (larger - 1) * low * (1 - of_low) * of_low, mask=there)
    tl.store(out + groups + group, slope * (larger + 1) * high * (1 - of_high) * of_high, mask=there)


def quantized(
    w_OI: Tensor, logits_2OG: Tensor, low_OG: Tensor, high_OG: Tensor, bits: int, symmetric: bool, out_OI: Tensor
) -> None:
    """See `besa.kernels.quantized`."""
    tensors = (w_OI.contiguous(), logits_2OG, low_OG, high_OG, out_OI)
    _start(_quantized, tensors, w_OI.numel(), low_OG.numel(), bits, symmetric, columns_apart=True)


def clipping_gradient(
    gradient_OI: Tensor,
    w_OI: Tensor,
    logits_2OG: Tensor,
    low_OG: Tensor,
    high_OG: Tensor,
    bits: int,
    symmetric: bool,
) -> Tensor:
    """See `besa.kernels.clipping_gradient`."""
    out_2OG = torch.empty_like(logits_2OG)
    tensors = (gradient_OI, w_OI.contiguous(), logits_2OG, low_OG, high_OG, out_2OG)
    _start(_clipping_gradient, tensors, w_OI.numel(), low_OG.numel(), bits, symmetric, columns_apart=False)
    return out_2OG


def _start(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    weights: int,
    groups: int,
    bits: int,
    symmetric: bool,
    columns_apart: bool,
) -> None:
    """Start a kernel; `columns_apart`: a program takes one tile, not all tiles of its groups."""
    size = weights // groups
    block = min(COLUMNS, triton.next_power_of_2(size))
    together = min(GROUPS, TILE // block)
    launch(
        kernel,
        (triton.cdiv(groups, together), triton.cdiv(size, block) if columns_apart else 1),
        *tensors,
        groups,
        size,
        LARGEST=2**bits - 1,
        SYMMETRIC=symmetric,
        SMALLEST=SMALLEST,
        GROUPS=together,
        BLOCK=block,
        enable_fp_fusion=False,  # codes are those of the final weight, which torch computes
    )
