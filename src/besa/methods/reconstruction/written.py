"""How rebuilt weights are written: in the dtype of the model, with no zero that was not asked for."""

from __future__ import annotations

import torch
from torch import Tensor


def written(rebuilt_OI: Tensor, kept_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 weight (O, I) in `dtype`; what is kept is not zero, though it be too small (float16 ends at 6e-8)."""
    written_OI = rebuilt_OI.to(dtype)
    return written_OI.masked_fill_((written_OI == 0) & kept_OI, torch.finfo(dtype).smallest_normal)
