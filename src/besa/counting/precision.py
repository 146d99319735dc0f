"""The widest floating-point numbers that a device computes with."""

from __future__ import annotations

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
