"""The kernels of tiles.cpp and matrix.cpp, for many rows of x, called on torch's tensors.

Shape suffixes: N rows of x, O rows and I columns of the weight.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from besa.kernels import sparse_native
from besa.kernels.build import load, runnable
from besa.storage.formats.bitmask import FLOATS, Bitmask

MATRIX, PAIRS, SINGLES = "matrix", "pairs", "singles"
HALVES = (MATRIX, PAIRS)  # for bfloat16 only
SOURCES = {MATRIX: "matrix.cpp", PAIRS: "tiles.cpp", SINGLES: "tiles.cpp"}


@cache
def paths() -> list[str]:
    """The ways in which this processor can multiply, best first; none without AVX-512.

    `matrix` is its matrix unit and `pairs` are products of pairs, both for bfloat16; `singles` are float32 products.
    """
    return [name for name, source in SOURCES.items() if runnable(source, [name])]


def path_of(dtype: torch.dtype, paths: list[str]) -> str:
    """The first of the paths that is for weights and inputs of a dtype."""
    return next(path for path in paths if path not in HALVES or dtype == torch.bfloat16)


def serves(weight: Bitmask | Tensor) -> bool:
    """Whether there is a kernel for a bitmask of this kind and grid, or for a dense weight."""
    if isinstance(weight, Bitmask):
        return bool(paths()) and sparse_native.serves(weight)
    return bool(paths()) and weight.device.type == "cpu" and weight.dtype in FLOATS and weight.is_contiguous()


def multiply(x_NI: Tensor, weight: Bitmask | Tensor, path: str = "", dtype: torch.dtype = torch.float32) -> Tensor:
    """y = x Wᵀ (N, O).

    Args:
        x_NI: in the weight's dtype, with at least one row.
        weight: that `serves` allows.
        path: one of `paths`; by default the best.
        dtype: of y. Sums are float32, and rounded in the end.
    """
    path = path or path_of(x_NI.dtype, paths())
    x_NI = (x_NI if path in HALVES else x_NI.float()).contiguous()
    rounded = path in HALVES and dtype == torch.bfloat16
    y_NO = x_NI.new_empty(len(x_NI), weight.shape[0], dtype=dtype if rounded else torch.float32)
    if isinstance(weight, Bitmask):
        kind, passed = weight.kind, sparse_native.passed(weight)
    else:
        kind, passed = f"dense_{str(weight.dtype).removeprefix('torch.')}", sparse_native.passed_dense(weight)
    kernels = load(SOURCES[path])
    assert kernels is not None
    numbers = (x_NI.data_ptr(), len(x_NI), y_NO.data_ptr(), rounded, torch.get_num_threads())
    kernels[f"tiles_{kind}_{path}"](ctypes.byref(passed), *(ctypes.c_int64(number) for number in numbers))
    return y_NO.to(dtype)
