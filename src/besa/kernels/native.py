"""The kernels of masks.cpp, called on torch's tensors."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from besa.kernels.build import load, runnable

SOURCE = "masks.cpp"
NUMBERS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@cache
def paths() -> list[str]:
    """The instruction sets of this processor for which there are kernels, best first; none without a compiler."""
    return runnable(SOURCE)


def serves(w_OI: Tensor) -> bool:
    """Whether there is a kernel for weights of this kind."""
    return w_OI.device.type == "cpu" and w_OI.dtype in NUMBERS and bool(paths())


def masked(w_OI: Tensor, ranks_OI: Tensor, counts_O: Tensor, out_OI: Tensor, path: str = "") -> None:
    """See `besa.kernels.masked`; `path` is the instruction set, by default the best."""
    rows, columns = w_OI.shape
    name = f"masked_{8 * w_OI.itemsize}_{8 * ranks_OI.itemsize}_{path or paths()[0]}"
    _call(name, w_OI, ranks_OI, counts_O, out_OI, rows, columns)


def binned(gradient_OI: Tensor, w_OI: Tensor, ranks_OI: Tensor, bins_I: Tensor, out_OB: Tensor, path: str = "") -> None:
    """See `besa.kernels.binned`; `path` is the instruction set, by default the best."""
    rows, columns = w_OI.shape
    name = f"binned_{NUMBERS[w_OI.dtype]}_{8 * ranks_OI.itemsize}_{path or paths()[0]}"
    _call(name, gradient_OI, w_OI, ranks_OI, bins_I, out_OB, rows, columns, out_OB.shape[1])


def spread(w_OI: Tensor, kept_K: Tensor, out_OI: Tensor, path: str = "") -> None:
    """See `besa.kernels.spread`; `path` is the instruction set, by default the best."""
    _call(f"spread_{NUMBERS[w_OI.dtype]}_{path or paths()[0]}", w_OI, kept_K, out_OI, *w_OI.shape)


def gathered(w_OI: Tensor, x_OI: Tensor, out_K: Tensor, path: str = "") -> None:
    """See `besa.kernels.gathered`; `path` is the instruction set, by default the best."""
    _call(f"gathered_{NUMBERS[w_OI.dtype]}_{path or paths()[0]}", w_OI, x_OI, out_K, *w_OI.shape)


def _call(name: str, *arguments: Tensor | int) -> None:
    kernels = load(SOURCE)
    assert kernels is not None
    passed: list[ctypes.c_void_p | ctypes.c_int64] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            assert argument.is_contiguous()
            passed.append(ctypes.c_void_p(argument.data_ptr()))
        else:
            passed.append(ctypes.c_int64(argument))
    kernels[name](*passed, ctypes.c_int64(torch.get_num_threads()))
