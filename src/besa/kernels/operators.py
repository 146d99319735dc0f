"""Kernels as operators of torch, `besa::…`: with one implementation for each kind of device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from besa.errors import Notice
from besa.kernels import native, reference

LIBRARY = torch.library.Library("besa", "DEF")
OTHERS = ("MPS", "XPU")  # torch's names of devices for which there are no kernels


def operator(schema: str, gpu: str) -> Callable[..., Any]:
    """Define an operator.

    Args:
        schema: name, arguments and results, in torch's notation. The function of the same name in `reference` computes
            it in plain torch. It serves the devices without kernels, and the CPU unless `native` has a function of that
            name.
        gpu: module of `besa.kernels.gpu` that has a function of the same name.
    """
    name = LIBRARY.define(schema)
    plain: Callable[..., Any] = getattr(reference, name)
    in_cpp: Callable[..., Any] | None = getattr(native, name, None)

    def on_cpu(first: Tensor, *others: Any) -> Any:
        return (in_cpp if in_cpp and native.serves(first) else plain)(first, *others)

    def on_gpu(first: Tensor, *others: Any) -> Any:
        in_triton = getattr(import_module(f"besa.kernels.gpu.{gpu}"), name) if triton_works(first.device) else plain
        return in_triton(first, *others)

    LIBRARY.impl(name, on_cpu if in_cpp else plain, "CPU")
    LIBRARY.impl(name, on_gpu, "CUDA")
    for key in OTHERS:
        LIBRARY.impl(name, plain, key)
    found: Callable[..., Any] = getattr(torch.ops.besa, name).default
    return found


@cache
def triton_works(device: torch.device) -> bool:
    """Whether Triton compiles and starts kernels on a GPU; a notice says once why it does not."""
    try:
        masks = import_module("besa.kernels.gpu.masks")
        one_OI, rank_OI = torch.ones(1, 1, device=device), torch.zeros(1, 1, dtype=torch.int16, device=device)
        masks.masked(one_OI, rank_OI, torch.ones(1, dtype=torch.int64, device=device), one_OI)
    except Exception as error:  # no Triton, no C compiler for it, a GPU that is too old: it has no errors of its own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        warnings.warn(
            f"besa computes more slowly than it could, in plain torch: Triton does not work here ({reason}).",
            Notice,
            stacklevel=2,
        )
        return False
    return True
