"""Torch's default settings, whatever the program has chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from besa.counting.precision import products_in

AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # the devices that besa computes on: each has a switch of its own


@contextmanager
def defaults() -> Iterator[None]:
    """New tensors are of float32 and on the CPU, and operators compute in the dtype of their inputs.

    Gradients can be computed, and products of float32 are of float32: TF32 is off.
    """
    chosen = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(products_in(torch.float32))
            if torch.get_default_device().type != "cpu":  # a context slows every call of torch
                stack.enter_context(torch.device("cpu"))
            for kind in AUTOCAST:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.set_default_dtype(chosen)
