"""Torch's switches as they are when a program starts, whatever the program has chosen since."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # the devices that besa computes on: each has a switch of its own


@contextmanager
def defaults() -> Iterator[None]:
    """New tensors are of float32, operators compute in the dtype of their inputs, and gradients can be computed."""
    chosen = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for kind in AUTOCAST:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.set_default_dtype(chosen)
