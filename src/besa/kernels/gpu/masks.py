"""The kernels of masks.cpp in Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from besa.kernels.gpu.launching import launch

COLUMNS = 1024  # that a program takes at a time
TILE = 1024  # bins × ranks that a program sums at a time
BINS = 128  # at most, in a tile
PROGRAMS = 1024  # of `binned`, at most: they fill a GPU
SCRATCH = 1 << 23  # float32 numbers that these programs keep: the cache of a GPU holds them


@triton.jit
def _masked(w, ranks, counts, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    place = row * columns + at
    kept = tl.load(ranks + place, mask=inside, other=0) >= tl.load(counts + row)
    tl.store(out + place, tl.load(w + place, mask=inside & kept, other=0.0), mask=inside)


@triton.jit
def _first_rank(bins, bin, columns, halvings):
    """The first rank whose bin is at least `bin`, by bisection; `columns` if there is none."""
    low = tl.zeros_like(bin)
    high = low + columns
    halved = 0
    while halved < halvings:
        middle = (low + high) // 2
        below = tl.load(bins + middle, mask=middle < high, other=32767).to(tl.int32) < bin
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
        halved += 1
    return low


@triton.jit(do_not_specialize=["rows", "n_bins", "halvings"])
def _binned(
    gradient,
    w,
    ranks,
    bins,
    scratch,
    out,
    rows,
    columns,
    n_bins,
    halvings,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    RANKS: tl.constexpr,
):
    row = tl.program_id(0)
    products = scratch + tl.cast(row, tl.int64) * columns
    while row < rows:
        begin = tl.cast(row, tl.int64) * columns
        left = 0
        while left < columns:
            at = left + tl.arange(0, BLOCK)
            inside = at < columns
            product = tl.load(gradient + begin + at, mask=inside, other=0.0).to(tl.float32)
            product *= tl.load(w + begin + at, mask=inside, other=0.0).to(tl.float32)
            rank = tl.load(ranks + begin + at, mask=inside, other=0).to(tl.int32)
            tl.store(products + rank, product, mask=inside)
            left += BLOCK
        tl.debug_barrier()
        lowest = 0
        while lowest < n_bins:
            bin = lowest + tl.arange(0, BINS)
            rank = _first_rank(bins, bin, columns, halvings)
            end = _first_rank(bins, bin + 1, columns, halvings)
            sums = tl.zeros((BINS,), dtype=tl.float32)
            while tl.max(end - rank, 0) > 0:
                run = rank[:, None] + tl.arange(0, RANKS)[None, :]
                sums += tl.sum(tl.load(products + run, mask=run < end[:, None], other=0.0), axis=1)
                rank += RANKS
            tl.store(out + tl.cast(row, tl.int64) * n_bins + bin, sums, mask=bin < n_bins)
            lowest += BINS
        tl.debug_barrier()
        row += tl.num_programs(0)


@triton.jit
def _places(w, begin, left, columns, met, BLOCK: tl.constexpr):
    """Some columns of a row: addresses, which are in the row, which are kept, and their places in the vector."""
    at = left + tl.arange(0, BLOCK)
    inside = at < columns
    is_kept = (tl.load(w + begin + at, mask=inside, other=0.0) != 0).to(tl.int32)
    return begin + at, inside, is_kept, met + tl.cumsum(is_kept, 0) - 1


@triton.jit
def _spread(w, kept, starts, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    met = tl.load(starts + row)
    left = 0
    while left < columns:
        at, inside, is_kept, place = _places(w, row * columns, left, columns, met, BLOCK)
        numbers = tl.load(kept + place, mask=is_kept > 0, other=0.0)
        tl.store(out + at, numbers.to(out.dtype.element_ty), mask=inside)
        met += tl.sum(is_kept, 0)
        left += BLOCK


@triton.jit
def _gathered(w, x, starts, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    met = tl.load(starts + row)
    left = 0
    while left < columns:
        at, _inside, is_kept, place = _places(w, row * columns, left, columns, met, BLOCK)
        numbers = tl.load(x + at, mask=is_kept > 0, other=0.0).to(tl.float32)
        tl.store(out + place, numbers, mask=is_kept > 0)
        met += tl.sum(is_kept, 0)
        left += BLOCK


def masked(w_OI: Tensor, ranks_OI: Tensor, counts_O: Tensor, out_OI: Tensor) -> None:
    """See `besa.kernels.masked`."""
    rows, columns = w_OI.shape
    block = min(COLUMNS, triton.next_power_of_2(columns))
    launch(_masked, (rows, triton.cdiv(columns, block)), w_OI, ranks_OI, counts_O, out_OI, columns, BLOCK=block)


def binned(gradient_OI: Tensor, w_OI: Tensor, ranks_OI: Tensor, bins_I: Tensor, out_OB: Tensor) -> None:
    """See `besa.kernels.binned`.

    Ranks order the products of a row, so each bin is a run of them. A program writes the products of a row in this
    order to its scratch row, and adds up the runs. Every weight is read once; nothing depends on the order of programs.
    """
    rows, columns = w_OI.shape
    programs, n_bins = min(rows, PROGRAMS, -(-SCRATCH // columns)), out_OB.shape[1]
    scratch = torch.empty(programs, columns, device=w_OI.device)
    width = min(BINS, triton.next_power_of_2(n_bins))
    launch(
        _binned,
        (programs,),
        gradient_OI,
        w_OI,
        ranks_OI,
        bins_I,
        scratch,
        out_OB,
        rows,
        columns,
        n_bins,
        columns.bit_length(),
        BLOCK=min(COLUMNS, triton.next_power_of_2(columns)),
        BINS=width,
        RANKS=TILE // width,
        num_warps=8,
    )


def spread(w_OI: Tensor, kept_K: Tensor, out_OI: Tensor) -> None:
    """See `besa.kernels.spread`."""
    _by_rows(_spread, w_OI, kept_K, out_OI)


def gathered(w_OI: Tensor, x_OI: Tensor, out_K: Tensor) -> None:
    """See `besa.kernels.gathered`."""
    _by_rows(_gathered, w_OI, x_OI, out_K)


def _by_rows(kernel: Any, w_OI: Tensor, source: Tensor, out: Tensor) -> None:
    """Start a kernel with where the kept weights of each row begin."""
    counts_O = (w_OI != 0).sum(1)
    rows, columns = w_OI.shape
    block = min(COLUMNS, triton.next_power_of_2(columns))
    launch(kernel, (rows,), w_OI, source, counts_O.cumsum(0) - counts_O, out, columns, BLOCK=block)
