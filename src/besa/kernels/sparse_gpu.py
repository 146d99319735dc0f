"""The product of a few rows of x and a bitmask weight on a GPU, in Triton: one program for each band."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from besa.storage.formats.bitmask import ROWS, Bitmask

KINDS = ("bfloat16", "float16")
FEW = 8  # rows of x
TILE = 4096  # weights × rows of x that a program holds at a time


@triton.jit  # type: ignore[untyped-decorator]
def _ones(word: Any) -> Any:
    """Bits that are set in 32-bit words: added in pairs, then in fours, then in bytes."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word += word >> 8
    return ((word + (word >> 16)) & 63).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(
    masks: Any,
    values: Any,
    offsets: Any,
    x: Any,
    y: Any,
    rows: Any,
    batch: Any,
    COLUMNS: tl.constexpr,
    BATCH: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    chunks: tl.constexpr = (COLUMNS + 31) // 32
    band = tl.program_id(0).to(tl.int64)
    run = tl.arange(0, CHUNKS * ROWS)
    lane = tl.arange(0, 32)
    below = (1 << lane).to(tl.uint32) - 1
    n = tl.arange(0, BATCH)
    begin = tl.load(offsets + band) // 2
    sums = tl.zeros((BATCH, CHUNKS * ROWS), dtype=tl.float32)
    for left in range(0, chunks, CHUNKS):
        inside = left + run // ROWS < chunks
        mask = tl.load(masks + (band * chunks + left) * ROWS + run, mask=inside, other=0).to(tl.uint32, bitcast=True)
        count = _ones(mask)
        start = begin + tl.cumsum(count, 0) - count
        kept = ((mask[:, None] >> lane[None, :].to(tl.uint32)) & 1) == 1
        place = start[:, None] + _ones(mask[:, None] & below[None, :])
        w = tl.load(values + place, mask=kept, other=0.0).to(tl.float32)
        column = (left + run // ROWS)[:, None] * 32 + lane[None, :]
        meets = (n < batch)[:, None, None] & (kept & (column < COLUMNS))[None, :, :]
        of_x = tl.load(x + n[:, None, None] * COLUMNS + column[None, :, :], mask=meets, other=0.0).to(tl.float32)
        sums += tl.sum(of_x * w[None, :, :], axis=2)
        begin += tl.sum(count, 0)
    totals = tl.sum(tl.reshape(sums, (BATCH, CHUNKS, ROWS)), axis=1)
    row = band * ROWS + tl.arange(0, ROWS)
    stored = (n < batch)[:, None] & (row < rows)[None, :]
    tl.store(y + n[:, None] * rows + row[None, :], totals, mask=stored)


def serves(x_NI: Tensor, weight: Bitmask) -> bool:
    """Whether there is a kernel for weights of this kind, and so few rows of x."""
    return weight.kind in KINDS and 0 < len(x_NI) <= FEW


def multiply(x_NI: Tensor, weight: Bitmask) -> Tensor:
    """x Wᵀ (N, O) in the dtype of x; products are added in float32."""
    bands, chunks, _ = weight.masks_BCR.shape
    batch = triton.next_power_of_2(len(x_NI))
    y_NO = torch.empty(len(x_NI), weight.shape[0], dtype=x_NI.dtype, device=x_NI.device)
    _multiply[bands,](
        weight.masks_BCR,
        weight.values,
        weight.offsets,
        x_NI.contiguous(),
        y_NO,
        weight.shape[0],
        len(x_NI),
        COLUMNS=weight.shape[1],
        BATCH=batch,
        CHUNKS=min(triton.next_power_of_2(chunks), TILE // (batch * ROWS * 32)),
        ROWS=ROWS,
    )
    return y_NO
