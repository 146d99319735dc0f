"""Codes for weights that have moved: the columns after each column make up for its rounding error.

This is GPTQ (Frantar et al., 2023, arXiv 2210.17323).

Shape suffixes: O rows (output channels), I columns (input channels), B columns of the present block.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from besa.methods.reconstruction.obs_update import inverse_factor
from besa.methods.reconstruction.ridge import best_ridge, is_better, with_ridge
from besa.methods.reconstruction.written import written
from besa.observing.input_statistics import InputStatistics, inverted
from besa.quantization import Grid, Moved, Unrounded
from besa.quantization.minmax import dequantized, kept_codes
from besa.quantization.searching import SHARES, best_grid
from besa.system import ranks

COLUMNS = 128  # swept before the columns to the right are updated


def unrounded(
    w_OI: Tensor, dense_OI: Tensor, statistics: InputStatistics, quantization: Moved, groups: int
) -> Unrounded:
    """The weight as it is to be rounded, with its grid; on held-out tokens never worse than rounding `w_OI` itself.

    Args:
        w_OI: the pruned weight in the dtype of the model; its zeros stay.
        dense_OI: the dense weight.
        statistics: of the linear's input.
        quantization: settings.
        groups: of a row.

    Raises:
        BesaError: the Hessian of the inputs is not positive definite.
    """
    shares = SHARES if quantization.clipping == "searched" else (1.0,)
    grid = best_grid(w_OI, statistics.squares_I, groups, quantization.bits, quantization.symmetric, shares)
    plain = Unrounded(w_OI, grid, quantization.symmetric)
    if quantization.rounding == "nearest":
        return plain
    hessian_II = with_ridge(statistics, best_ridge(dense_OI, w_OI != 0, statistics))
    factor_II = inverse_factor(inverted(hessian_II))

    def of_rows(rows: slice) -> Tensor:
        return round_columns(w_OI[rows], factor_II, grid.rows(rows))

    swept = Unrounded(ranks.by_rows(of_rows, len(w_OI)), grid, quantization.symmetric)
    helps = is_better(swept.quantized().weight(), plain.quantized().weight(), dense_OI, statistics)
    return replace(plain, w_OI=swept.w_OI.where(helps, w_OI))


def round_columns(w_OI: Tensor, factor_II: Tensor, grid: Grid) -> Tensor:
    """Round the columns from left to right, each with what earlier ones have added to it; zeros stay zeros.

    A column loses w − Q(w). Where a weight is pruned, it loses all that earlier columns have added.

    Args:
        w_OI: the pruned weight, in the dtype of the model.
        factor_II: `inverse_factor` of the input's Hessian.
        grid: of the weight.

    Returns:
        The weight (O, I) in its dtype, as each column was before its rounding.
    """
    width, size = w_OI.shape[1], w_OI.shape[1] // grid.step_OG.shape[1]
    left_OI, kept_OI, before_OI = w_OI.to(torch.float32, copy=True), w_OI != 0, torch.empty_like(w_OI)
    for start in range(0, width, COLUMNS):
        end = min(start + COLUMNS, width)
        block_OB, error_OB = left_OI[:, start:end], torch.empty_like(left_OI[:, start:end])  # a view
        factor_BB = factor_II[start:end, start:end]
        for j in range(end - start):
            column, group = slice(start + j, start + j + 1), slice((start + j) // size, (start + j) // size + 1)
            present_O1, kept_O1 = block_OB[:, j : j + 1], kept_OI[:, column]
            before_O1 = written(present_O1.where(kept_O1, 0), kept_O1, w_OI.dtype)
            of_column = Grid(grid.step_OG[:, group], grid.zero_OG[:, group], grid.bits)
            rounded_O1 = dequantized(kept_codes(before_O1, of_column), of_column, w_OI.dtype).float()
            before_OI[:, column] = before_O1
            error_OB[:, j : j + 1] = (present_O1 - rounded_O1) / factor_BB[j, j]
            block_OB[:, j + 1 :] -= error_OB[:, j : j + 1] * factor_BB[j, j + 1 :]
        left_OI[:, end:] -= error_OB @ factor_II[start:end, end:]
    return before_OI
