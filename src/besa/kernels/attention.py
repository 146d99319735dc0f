"""Attention of one query to each sequence, on the CPU: what decoding does in every block.

Torch's own attention is made for many queries at once. With one query it reads keys and values at a small part of the
memory bandwidth (docs/log.md).

Shape suffixes: N sequences, H heads, K KV heads, T tokens, D head dimension.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from besa.kernels import build
from besa.kernels.build import runnable

SOURCE = "attention.cpp"
DTYPES = (torch.bfloat16, torch.float32)
SHARE = 1 << 15  # products for which another thread is worth its start


class Attention(ctypes.Structure):
    """The arguments as a C structure for the kernels; strides are in elements."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "allowed", "out")),
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "shared", "tokens", "width", "value_width")),
        *((f"query_{axis}", ctypes.c_int64) for axis in ("sequence", "head")),
        *((f"key_{axis}", ctypes.c_int64) for axis in ("sequence", "head", "token")),
        *((f"value_{axis}", ctypes.c_int64) for axis in ("sequence", "head", "token")),
        *((name, ctypes.c_int64) for name in ("allowed_sequence", "share")),
        ("scale", ctypes.c_float),
    ]


@cache
def paths() -> list[str]:
    """The instruction sets of this processor for which there are kernels, best first; none without a compiler."""
    return runnable(SOURCE)


def serves(query_NH1D: Tensor, keys_NKTD: Tensor, values_NKTD: Tensor, allowed_N11T: Tensor | None) -> bool:
    """Whether there is a kernel: for one query to each sequence, with the head dimension contiguous."""
    return (
        query_NH1D.is_cpu
        and query_NH1D.dim() == 4
        and query_NH1D.size(2) == 1
        and query_NH1D.dtype in DTYPES
        and query_NH1D.dtype == keys_NKTD.dtype == values_NKTD.dtype
        and query_NH1D.stride(3) == keys_NKTD.stride(3) == values_NKTD.stride(3) == 1
        and query_NH1D.numel() > 0
        and keys_NKTD.numel() > 0
        and query_NH1D.size(0) == keys_NKTD.size(0)
        and query_NH1D.size(1) % keys_NKTD.size(1) == 0
        and query_NH1D.size(3) == keys_NKTD.size(3)
        and keys_NKTD.shape[:3] == values_NKTD.shape[:3]
        and (allowed_N11T is None or allows(allowed_N11T, query_NH1D.size(0), keys_NKTD.size(2)))
        and bool(paths())
    )


def allows(allowed_N11T: Tensor, sequences: int, tokens: int) -> bool:
    """Whether the kernels accept a mask."""
    return (
        allowed_N11T.is_cpu
        and allowed_N11T.dtype == torch.bool
        and allowed_N11T.shape[1:] == (1, 1, tokens)
        and allowed_N11T.size(0) in (1, sequences)
        and allowed_N11T.stride(3) == 1
    )


def attend(
    query_NH1D: Tensor,
    keys_NKTD: Tensor,
    values_NKTD: Tensor,
    allowed_N11T: Tensor | None,
    scale: float,
    path: str = "",
) -> Tensor:
    """softmax(scale · q Kᵀ) V (N, 1, H, D), in the dtype of all three. Where no token is allowed, it is zero.

    Scores, their softmax and sums are float32; the relative error of e^x is at most 2^-22. Each KV head serves H / K
    neighbouring query heads.

    Args:
        query_NH1D: `serves` must accept it, as all tensors.
        keys_NKTD: with the head dimension of the query.
        values_NKTD: may have another head dimension.
        allowed_N11T: which tokens count; all, if None. N may be 1 for all sequences.
        scale: of the scores.
        path: instruction set; by default the best.
    """
    sequences, heads, _, width = query_NH1D.shape
    shared, tokens, value_width = keys_NKTD.size(1), keys_NKTD.size(2), values_NKTD.size(3)
    out_N1HD = query_NH1D.new_empty(sequences, 1, heads, value_width)
    given = Attention(
        query_NH1D.data_ptr(),
        keys_NKTD.data_ptr(),
        values_NKTD.data_ptr(),
        None if allowed_N11T is None else allowed_N11T.data_ptr(),
        out_N1HD.data_ptr(),
        *(sequences, heads, shared, tokens, width, value_width),
        *query_NH1D.stride()[:2],
        *keys_NKTD.stride()[:3],
        *values_NKTD.stride()[:3],
        0 if allowed_N11T is None or len(allowed_N11T) == 1 else allowed_N11T.stride(0),
        SHARE,
        scale,
    )
    function(query_NH1D.dtype, path)(ctypes.addressof(given), torch.get_num_threads())
    return out_N1HD


@cache
def function(dtype: torch.dtype, path: str = "") -> Callable[[int, int], None]:
    """The kernel for a dtype; it takes the address of an `Attention` and the largest number of threads.

    Args:
        dtype: one of `DTYPES`.
        path: instruction set; by default the best.
    """
    name = f"attend_{str(dtype).removeprefix('torch.')}_{path or paths()[0]}"
    kernel: Callable[[int, int], None] = build.function(SOURCE, name, [ctypes.c_void_p, ctypes.c_int64])
    return kernel
