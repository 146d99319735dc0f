"""Derivatives, which besa's kernels do not compute: neither gradients nor forward-mode tangents."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from besa.errors import BesaError
from besa.runtime.tracing import tracing


def wanted(*tensors: Tensor) -> bool:
    """Whether a derivative is wanted of what is computed from these tensors."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    return not tracing() and any(unpack_dual(tensor).tangent is not None for tensor in tensors)


def refuse(x: Tensor) -> None:
    """Refuse an input of a packed layer of which a derivative is wanted.

    Raises:
        BesaError: one is.
    """
    if wanted(x):
        raise BesaError("Packed linears compute no gradients: train the dense model, which `besa unpack` writes.")
