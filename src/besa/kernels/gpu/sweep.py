"""SparseGPT's loop over the columns of a block: rows are independent, so a program takes a few of them through it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from besa.kernels import reference
from besa.kernels.gpu.launching import launch

WIDEST = 8192  # columns that the registers of a program hold
ROWS = 32  # of a program, at most
TILE = 1024  # weights of a program, where a row has fewer
OF_WARP = 512  # weights


@triton.jit(do_not_specialize=["rows"])
def _swept(
    block,
    kept,
    factor,
    error,
    rows,
    columns,
    to_row_of_block,
    to_column_of_block,
    to_row_of_kept,
    to_column_of_kept,
    to_row_of_error,
    to_column_of_error,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    there = row < rows
    inside = there[:, None] & (column < columns)[None, :]
    place = block + row[:, None] * to_row_of_block + column.to(tl.int64)[None, :] * to_column_of_block
    of_kept, of_error = kept + row * to_row_of_kept, error + row * to_row_of_error
    w = tl.load(place, mask=inside, other=0.0)
    j = 0
    while j < columns:
        at = tl.cast(j, tl.int64)
        keeps = tl.load(of_kept + at * to_column_of_kept, mask=there, other=True).to(tl.int1)
        of_factor = factor + at * columns
        present = tl.sum(tl.where((column == j)[None, :], w, 0.0), axis=1)
        lost = tl.where(keeps, 0.0, present) / tl.load(of_factor + j)
        tl.store(of_error + at * to_column_of_error, lost, mask=there)
        reach = tl.load(of_factor + column, mask=(column >= j) & (column < columns), other=0.0)
        w -= lost[:, None] * reach[None, :]
        j += 1
    of_kept = kept + row[:, None] * to_row_of_kept + column.to(tl.int64)[None, :] * to_column_of_kept
    keeps = tl.load(of_kept, mask=inside, other=False).to(tl.int1)
    tl.store(place, tl.where(keeps, w, 0.0), mask=inside)  # exactly zero in spite of rounding


def swept(block_OB: Tensor, kept_OB: Tensor, factor_BB: Tensor, error_OB: Tensor) -> None:
    """See `besa.kernels.swept`."""
    rows, columns = block_OB.shape
    if columns > WIDEST:
        reference.swept(block_OB, kept_OB, factor_BB, error_OB)
        return
    width = triton.next_power_of_2(columns)
    together = min(ROWS, max(1, TILE // width))
    launch(
        _swept,
        (triton.cdiv(rows, together),),
        block_OB,
        kept_OB,
        factor_BB.contiguous(),  # every program reads its rows, and that of Cholesky lies column by column
        error_OB,
        rows,
        columns,
        *block_OB.stride(),
        *kept_OB.stride(),
        *error_OB.stride(),
        ROWS=together,
        COLUMNS=width,
        num_warps=max(4, width // OF_WARP),
    )
