"""Torch's switches as they are when a program starts, whatever the program has chosen since."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def defaults() -> Iterator[None]:
    """New tensors are of float32, and gradients can be computed."""
    chosen = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(chosen)
