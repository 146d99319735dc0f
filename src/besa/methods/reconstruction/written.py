"""Rebuilt weights in the dtype of the model, without new zeros."""

from __future__ import annotations

import torch
from torch import Tensor


def written(rebuilt_OI: Tensor, kept_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 weight (O, I) in `dtype`. A kept weight too small for it (float16: 6e-8) does not become zero."""
    written_OI = rebuilt_OI.to(dtype)
    return written_OI.masked_fill_((written_OI == 0) & kept_OI, torch.finfo(dtype).smallest_normal)
