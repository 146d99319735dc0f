"""Inputs of a packed layer in another dtype than the layer's, as under autocast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from besa.counting.precision import dtype_name
from besa.errors import BesaError


def cast(layer: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """The output of a layer for such an input, in autocast's dtype; the layer computes in its own.

    Args:
        layer: for inputs of its dtype.
        x: its input.
        dtype: of the layer.

    Raises:
        BesaError: autocast is off, so that the dtypes are a mistake, as for a linear of torch.
    """
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        raise BesaError(
            f"A packed layer computes in {dtype_name(dtype)} but got {dtype_name(x.dtype)}: load the model with "
            f"dtype={dtype_name(x.dtype)}, or compute under torch.autocast."
        )
    with torch.autocast(kind, enabled=False):
        y = layer(x.to(dtype))
    return y.to(torch.get_autocast_dtype(kind))
