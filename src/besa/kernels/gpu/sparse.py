"""Bitmask weights on a GPU, in Triton: unpacked, or multiplied with a few rows of x.

A program expands a tile of some bands at a time, from left to right, and carries on where the values of the last tile
ended. The position of a value is that of its word, a running sum, plus the bits below its own. Products run on tensor
cores: each warp has its own part of the tile's columns, and the parts are added at the end. Nothing waits for the host.

Shape suffixes, beyond those of `besa.storage.formats.bitmask`: W mask words of a band in a tile, L bits of a word,
S parts of a tile, K columns of a part, N rows of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from besa.kernels.gpu.launching import launch
from besa.storage.formats.bitmask import CHUNKS as LENGTHS
from besa.storage.formats.bitmask import ROWS, Bitmask

FEW = 16  # rows of x that a tensor core takes at once
HELD = 64  # bytes of a tile that a thread holds
# Without a bound, the assembler spills a few bytes to fit one more program into a multiprocessor.
OPTIONS = {"num_stages": 1} | ({} if torch.version.hip else {"maxnreg": 128})  # AMD's back end knows no bound
WORDS = {torch.int16: torch.uint16, torch.int32: torch.int32, torch.int64: torch.int32}  # as kernels read masks


@triton.jit
def _expanded(
    masks,
    values,
    scales,
    zeros,
    band_B,
    begin_B,
    left,
    rows,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    MIDDLE: tl.constexpr,
    HALVES: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The weights (B, W, L) of the chunks from `left` on, and where in `values` the next ones begin (B,)."""
    words: tl.constexpr = (COLUMNS + HALVES * LANES - 1) // (HALVES * LANES) * 4 * HALVES  # of a band
    lane_L = tl.arange(0, LANES)
    word_W = left * (4 * HALVES) + tl.arange(0, CHUNKS * 4 * HALVES)
    here_BW = (band_B * 4 < rows)[:, None] & (word_W < words)[None, :]
    place_BW = band_B[:, None] * words + word_W[None, :]
    mask_BW = tl.load(masks + place_BW, mask=here_BW, other=0).to(tl.int32)
    size_BW = libdevice.popc(mask_BW)
    if BITS == 4:  # the second word of a chunk ends with a whole byte
        other_BW = tl.load(masks + (place_BW ^ 1), mask=here_BW, other=0).to(tl.int32)
        size_BW += (size_BW + libdevice.popc(other_BW)) & word_W[None, :] & 1
    kept_BWL = ((mask_BW[:, :, None] >> lane_L) & 1) != 0
    below_L = (1 << lane_L) - 1
    at_BWL = (tl.cumsum(size_BW, 1) - size_BW)[:, :, None] + libdevice.popc(mask_BW[:, :, None] & below_L)
    from_B11 = (values + begin_B)[:, None, None]
    ends_B = tl.sum(size_BW, 1)
    if BITS == 0:
        w_BWL = tl.load(from_B11 + at_BWL, mask=kept_BWL, other=0.0)
    else:
        row_BW = band_B[:, None] * 4 + (word_W // HALVES % 4)[None, :]
        column_WL = (word_W // (4 * HALVES) * (HALVES * LANES) + word_W % HALVES * LANES)[:, None]
        if GROUP % LANES != 0 and GROUP != COLUMNS:  # a word meets several groups
            column_WL += lane_L[None, :]
        grid_BWL = row_BW[:, :, None] * (COLUMNS // GROUP) + (column_WL // GROUP)[None, :, :]
        inside_BWL = (here_BW & (row_BW < rows))[:, :, None] & (column_WL < COLUMNS)[None, :, :]
        step_BWL = tl.load(scales + grid_BWL, mask=inside_BWL, other=0.0)
        if MIDDLE:
            zero_BWL = tl.full((1, 1, 1), MIDDLE, tl.int32)
        else:
            zero_BWL = tl.load(zeros + grid_BWL, mask=inside_BWL, other=0).to(tl.int32)
        if BITS == 4:
            both_BWL = tl.load(from_B11 + (at_BWL >> 1), mask=kept_BWL, other=(zero_BWL * 17).to(tl.uint8))
            code_BWL = (both_BWL.to(tl.int32) >> ((at_BWL & 1) * 4)) & 15
            ends_B = ends_B // 2
        else:
            code_BWL = tl.load(from_B11 + at_BWL, mask=kept_BWL, other=zero_BWL.to(tl.uint8)).to(tl.int32)
        w_BWL = ((code_BWL - zero_BWL).to(tl.float32) * step_BWL.to(tl.float32)).to(step_BWL.dtype)
    return w_BWL, begin_B + ends_B


@triton.jit
def _unpack(
    masks,
    values,
    offsets,
    scales,
    zeros,
    out,
    rows,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    MIDDLE: tl.constexpr,
    HALVES: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    size: tl.constexpr = values.dtype.element_ty.primitive_bitwidth // 8
    band_B = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    begin_B = tl.load(offsets + band_B) // size
    for left in range(0, (COLUMNS + HALVES * LANES - 1) // (HALVES * LANES), CHUNKS):
        w_BWL, begin_B = _expanded(
            masks, values, scales, zeros, band_B, begin_B, left, rows,
            COLUMNS, GROUP, BITS, MIDDLE, HALVES, LANES, CHUNKS,
        )  # fmt: skip
        word_W = left * (4 * HALVES) + tl.arange(0, CHUNKS * 4 * HALVES)
        row_BW = band_B[:, None] * 4 + (word_W // HALVES % 4)[None, :]
        first_W = word_W // (4 * HALVES) * (HALVES * LANES) + word_W % HALVES * LANES
        column_WL = first_W[:, None] + tl.arange(0, LANES)[None, :]
        inside_BWL = (row_BW < rows)[:, :, None] & (column_WL < COLUMNS)[None, :, :]
        tl.store(out + row_BW[:, :, None] * COLUMNS + column_WL[None, :, :], w_BWL, mask=inside_BWL)


@triton.jit
def _multiply(
    masks,
    values,
    offsets,
    scales,
    zeros,
    x,
    y,
    rows,
    batch,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    MIDDLE: tl.constexpr,
    HALVES: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    BANDS: tl.constexpr,
    PARTS: tl.constexpr,
    BATCH: tl.constexpr,
):
    size: tl.constexpr = values.dtype.element_ty.primitive_bitwidth // 8
    K: tl.constexpr = CHUNKS // PARTS * HALVES * LANES
    band_B = tl.program_id(0).to(tl.int64) * BANDS + tl.arange(0, BANDS)
    begin_B = tl.load(offsets + band_B, mask=band_B * 4 < rows, other=0) // size
    n_N = tl.arange(0, BATCH)
    sums_SON = tl.zeros((PARTS, BANDS * 4, BATCH), dtype=tl.float32)
    for left in range(0, (COLUMNS + HALVES * LANES - 1) // (HALVES * LANES), CHUNKS):
        w_BWL, begin_B = _expanded(
            masks, values, scales, zeros, band_B, begin_B, left, rows,
            COLUMNS, GROUP, BITS, MIDDLE, HALVES, LANES, CHUNKS,
        )  # fmt: skip
        w_BSCRL = tl.reshape(w_BWL, (BANDS, PARTS, CHUNKS // PARTS, 4, HALVES * LANES))
        w_SOK = tl.reshape(tl.permute(w_BSCRL, (1, 0, 3, 2, 4)), (PARTS, BANDS * 4, K))
        column_SK = left * (HALVES * LANES) + tl.arange(0, PARTS)[:, None] * K + tl.arange(0, K)[None, :]
        inside_SKN = (column_SK < COLUMNS)[:, :, None] & (n_N < batch)[None, None, :]
        x_SKN = tl.load(x + n_N[None, None, :] * COLUMNS + column_SK[:, :, None], mask=inside_SKN, other=0.0)
        sums_SON = tl.dot(w_SOK, x_SKN, sums_SON, input_precision="ieee")
    row_O = tl.program_id(0).to(tl.int64) * (BANDS * 4) + tl.arange(0, BANDS * 4)
    inside_ON = (row_O < rows)[:, None] & (n_N < batch)[None, :]
    tl.store(y + n_N[None, :] * rows + row_O[:, None], tl.sum(sums_SON, 0), mask=inside_ON)


def unpack(weight: Bitmask) -> Tensor:
    """The dense weight (O, I), to the bit as `Bitmask.unpack` gives it."""
    rows, columns = weight.shape
    out_OI = torch.empty(rows, columns, dtype=weight.dtype, device=weight.values.device)
    grid, chunks = (triton.cdiv(rows, ROWS),), _chunks(weight, 1, warps=8)
    launch(_unpack, grid, *_tensors(weight), out_OI, rows, **_layout(weight), CHUNKS=chunks, num_warps=8, **OPTIONS)
    return out_OI


def multiply(x_NI: Tensor, weight: Bitmask) -> Tensor:
    """x Wᵀ (N, O) in the dtype of x, for up to `FEW` rows; products are added in float32.

    The value of a code is rounded to that dtype, as in a dense weight.
    """
    rows, batch = weight.shape[0], len(x_NI)
    bands, warps = (1, 16) if batch == 1 else (4, 8)  # of a program; the more bands, the less often x is read
    chunks = _chunks(weight, bands, warps)
    y_NO = torch.empty(batch, rows, dtype=x_NI.dtype, device=x_NI.device)
    launch(
        _multiply,
        (triton.cdiv(rows, bands * ROWS),),
        *_tensors(weight),
        x_NI.contiguous(),
        y_NO,
        rows,
        batch,
        **_layout(weight),
        CHUNKS=chunks,
        BANDS=bands,
        PARTS=min(chunks, warps),
        BATCH=1 if batch == 1 else FEW,
        num_warps=warps,
        **OPTIONS,
    )
    return y_NO


def _tensors(weight: Bitmask) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    masks_BCR = weight.masks_BCR.view(WORDS[weight.masks_BCR.dtype])
    return masks_BCR, weight.values, weight.offsets, weight.scales_OG, weight.zeros_OG


def _layout(weight: Bitmask) -> dict[str, int]:
    """What a kernel knows of a weight when it is compiled; `MIDDLE` is the code of zero of a symmetric grid."""
    columns, bits = weight.shape[1], weight.bits or 0
    groups = 1 if weight.scales_OG is None else weight.scales_OG.shape[1]
    length, word = LENGTHS[weight.kind]
    halves = 2 if word == torch.int64 else 1
    return {
        "COLUMNS": columns,
        "GROUP": columns // groups,
        "BITS": 0 if not bits else 4 if bits <= 4 else 8,
        "MIDDLE": 2 ** (bits - 1) if bits and weight.zeros_OG is None else 0,
        "HALVES": halves,
        "LANES": length // halves,
    }


def _chunks(weight: Bitmask, bands: int, warps: int) -> int:
    """Chunks of a tile: as many as the threads of a program can hold."""
    length, _ = LENGTHS[weight.kind]
    most = 32 * warps * HELD // weight.dtype.itemsize // (bands * ROWS * length)
    return int(min(triton.next_power_of_2(-(-weight.shape[1] // length)), most))
