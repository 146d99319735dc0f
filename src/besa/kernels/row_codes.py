"""Products with dense matrices of codes (`besa.storage.formats.row_codes`).

Few rows of x are multiplied in C++ on the CPU, as the codes are read. For many rows, and elsewhere, rows of the matrix
are made dense for torch.

Shape suffixes: N rows of x, O rows and I columns of the matrix.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from besa.counting.widening import linear
from besa.kernels.build import load, runnable
from besa.storage.formats.row_codes import RowCodes

SOURCE = "row_codes.cpp"
MANY = 32  # rows of x
PANEL = 4096  # rows of a matrix that are made dense at a time


@cache
def paths() -> list[str]:
    """The instruction sets of this processor for which there are kernels, best first; none without a compiler."""
    return runnable(SOURCE)


def multiplied(x_NI: Tensor, matrix: RowCodes) -> Tensor:
    """x Wᵀ (N, O).

    The kernels add the products of x and codes in float32, and multiply by the step at the end. The error of y is at
    most I/16 + 24 roundings of 2^-24 Σ|w||x|. Elsewhere, numbers are rounded to the dtype of the matrix first.

    Args:
        x_NI: in the dtype of the matrix, on its device.
        matrix: W.
    """
    assert x_NI.dtype == matrix.dtype
    if x_NI.device.type == "cpu" and 0 < len(x_NI) < MANY and paths():
        return multiply(x_NI.float(), matrix).to(x_NI.dtype)
    if x_NI.device.type != "cpu":
        return linear(x_NI, matrix.unpack())
    starts = range(0, len(matrix.codes_OI), PANEL)
    return torch.cat([linear(x_NI, matrix.unpack(slice(first, first + PANEL))) for first in starts], dim=1)


def multiply(x_NI: Tensor, matrix: RowCodes, path: str = "") -> Tensor:
    """x Wᵀ (N, O), float32, by a kernel.

    Args:
        x_NI: float32, on the CPU.
        matrix: W.
        path: instruction set; by default the best.
    """
    kernels, x_NI = load(SOURCE), x_NI.contiguous()
    assert kernels is not None
    assert matrix.codes_OI.is_contiguous()
    rows, columns = matrix.codes_OI.shape
    y_NO = x_NI.new_empty(len(x_NI), rows, dtype=torch.float32)
    tensors = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (matrix.codes_OI, x_NI, y_NO)]
    numbers = [ctypes.c_int64(number) for number in (len(x_NI), columns, rows, torch.get_num_threads())]
    kernels[f"multiply_{path or paths()[0]}"](*tensors, *numbers)
    return y_NO.mul_(matrix.steps_O1.float().T)
