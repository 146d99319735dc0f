"""How a kernel is started."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(
    kernel: Any, grid: tuple[int, ...], first: Tensor, /, *others: Tensor | float | None, **constants: float
) -> None:
    """Run a Triton kernel on the device of its first argument. Triton itself takes the current device.

    Args:
        kernel: decorated by `triton.jit`.
        grid: number of programs, in up to three dimensions.
        first: its first argument.
        others: its further arguments.
        constants: those that are `tl.constexpr`, and Triton's options, by name.
    """
    with torch.cuda.device_of(first):
        kernel[grid](first, *others, **constants)
