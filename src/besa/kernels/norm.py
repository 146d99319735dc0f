"""RMSNorm (Zhang & Sennrich, 2019, arXiv 1910.07467) in one C++ call on the CPU; plain torch needs eight operators.

Shape suffixes: N rows of x, I columns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from besa.kernels import build
from besa.kernels.build import runnable

SOURCE = "norm.cpp"
DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


class Form(NamedTuple):
    """How a model family computes RMSNorm.

    Attributes:
        more: added to the weight: 1 where the family stores weight − 1 (Gemma), else 0.
        rounded: whether the normalised x is rounded to its dtype before it is multiplied by the weight.
    """

    more: float
    rounded: bool


FORMS = (Form(0, True), Form(0, False), Form(1, False))


@cache
def paths() -> list[str]:
    """The instruction sets of this processor for which there are kernels, best first; none without a compiler."""
    return runnable(SOURCE)


def serves(x: Tensor, weight_I: Tensor) -> bool:
    """Whether there is a kernel for this input and weight."""
    return (
        x.is_cpu
        and weight_I.is_cpu
        and x.dtype == weight_I.dtype
        and x.dtype in DTYPES
        and x.size(-1) == weight_I.numel()
        and x.is_contiguous()
        and weight_I.is_contiguous()
        and bool(paths())
    )


def normed(x: Tensor, weight_I: Tensor, epsilon: float, form: Form, path: str = "") -> Tensor:
    """x / √(mean x² + ε) · (weight + more), in the shape and dtype of x; computed in float32.

    Args:
        x: (…, I), with `weight_I` as `serves` allows.
        weight_I: contiguous.
        epsilon: ε.
        form: of the model family.
        path: instruction set; by default the best.
    """
    y, width = torch.empty_like(x), weight_I.numel()
    kernel = function(x.dtype, path)
    kernel(x.data_ptr(), weight_I.data_ptr(), y.data_ptr(), x.numel() // width, width, epsilon, *form)
    return y


@cache
def function(dtype: torch.dtype, path: str = "") -> Callable[..., None]:
    """The kernel for a dtype of `DTYPES`; `path` as of `normed`."""
    arguments = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2, *[ctypes.c_float] * 2, ctypes.c_int64]
    name = f"norm_{DTYPES[dtype]}_{path or paths()[0]}"
    kernel: Callable[..., None] = build.function(SOURCE, name, arguments)
    return kernel
