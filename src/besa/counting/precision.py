"""The numbers that a device computes with: the widest there are, and those of half precision where they suffice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@cache
def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has none, as Apple's GPUs and some of Intel's."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def dtype_name(dtype: torch.dtype) -> str:
    """What a dtype is called in arguments and files, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


@contextmanager
def products_in(dtype: torch.dtype) -> Iterator[None]:
    """While open, float32 matrices are multiplied by the units for half precision, if `dtype` is of half precision.

    Numbers are rounded as they enter, and sums are float32. CUDA rounds to TF32, which holds every bfloat16 and float16
    number; a CPU with such units rounds to bfloat16. So the products of matrices that hold numbers of `dtype` are
    exact.
    """
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # it has one
    before = cuda.fp32_precision, cpu.fp32_precision
    try:
        cuda.fp32_precision = "ieee" if dtype == torch.float32 else "tf32"
        cpu.fp32_precision = "bf16" if dtype == torch.bfloat16 else "ieee"
        yield
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before
