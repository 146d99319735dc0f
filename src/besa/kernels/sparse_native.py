"""The kernels of sparse_avx512.cpp, sparse_neon.cpp and sparse.cpp, called on torch's tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from besa.kernels.build import load
from besa.storage.formats.bitmask import ROWS, Bitmask

SOURCES = {
    "avx512bf16": "sparse_avx512.cpp",
    "avx512": "sparse_avx512.cpp",
    "neonbf16": "sparse_neon.cpp",
    "neondot": "sparse_neon.cpp",
    "neon": "sparse_neon.cpp",
    "avx2": "sparse.cpp",
    "plain": "sparse.cpp",
}
SCALES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WIDEST = 1 << 20  # columns up to which the sum of products with a digit stays below 2^31


class _Weight(ctypes.Structure):
    """A bitmask as a C structure for the kernels."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("masks", "values", "offsets")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_void_p) for name in ("scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("scale_type", "groups", "zero")),
    ]


@cache
def paths() -> list[str]:
    """The instruction sets of this processor for which there are kernels, best first; none without a compiler."""
    return [name for name, source in SOURCES.items() if _has(load(source), name)]


def _has(kernels: ctypes.CDLL | None, name: str) -> bool:
    return kernels is not None and hasattr(kernels, f"has_{name}") and bool(kernels[f"has_{name}"]())


def serves(weight: Bitmask) -> bool:
    """Whether there is a kernel for weights of this kind and grid."""
    group = weight.shape[1] // (1 if weight.scales_OG is None else weight.scales_OG.shape[1])
    whole = group == weight.shape[1] or group % 64 == 0 or group in (4, 8, 16, 32)
    return weight.values.device.type == "cpu" and whole and weight.shape[1] <= WIDEST and bool(paths())


def multiply(x_NI: Tensor, weight: Bitmask, path: str = "") -> Tensor:
    """y = x Wᵀ (N, O), float32.

    Args:
        x_NI: float32; for a bfloat16 weight, its numbers must be exact in bfloat16.
        weight: on the CPU, with at least one row.
        path: instruction set; by default the best.
    """
    x_NI = x_NI.contiguous()
    y_NO = torch.empty(len(x_NI), weight.shape[0])
    _call("multiply", weight, path, x_NI.data_ptr(), len(x_NI), y_NO.data_ptr())
    return y_NO


def expand(weight: Bitmask, bands: slice, path: str = "") -> Tensor:
    """The values, or codes, of some bands (O, I), dense."""
    rows = min(ROWS * bands.stop, weight.shape[0]) - ROWS * bands.start
    out_OI = torch.empty(rows, weight.shape[1], dtype=weight.values.dtype)
    _call("expand", weight, path, bands.start, bands.stop, out_OI.data_ptr())
    return out_OI


def _call(work: str, weight: Bitmask, path: str, *arguments: int) -> None:
    packed = passed(weight)
    _function(work, weight.kind, path or paths()[0])(ctypes.addressof(packed), *arguments, torch.get_num_threads())


@cache
def _function(work: str, kind: str, path: str) -> Callable[..., None]:
    """A kernel that takes the address of a weight, and whole numbers."""
    kernels = load(SOURCES[path])
    assert kernels is not None
    function = kernels[f"{work}_{kind}_{path}"]
    function.argtypes, function.restype = [ctypes.c_void_p, *[ctypes.c_int64] * 4], None
    return function


def passed(weight: Bitmask) -> _Weight:
    """The weight as a C structure. Its tensors must live until the kernel returns."""
    scales_OG = weight.scales_OG
    tensors = (weight.masks_BCR, weight.values, weight.offsets)
    assert all(tensor.is_contiguous() for tensor in tensors)
    return _Weight(
        *(tensor.data_ptr() for tensor in tensors),
        *weight.shape,
        None if scales_OG is None else scales_OG.data_ptr(),
        None if weight.zeros_OG is None else weight.zeros_OG.data_ptr(),
        0 if scales_OG is None else SCALES[scales_OG.dtype],
        1 if scales_OG is None else scales_OG.shape[1],
        0 if weight.bits is None else 2 ** (weight.bits - 1),
    )


def passed_dense(w_OI: Tensor) -> _Weight:
    """A dense weight as a C structure, for kernels that take both; its tensor must live until the kernel returns."""
    return _Weight(None, w_OI.data_ptr(), None, *w_OI.shape, None, None, 0, 1, 0)
