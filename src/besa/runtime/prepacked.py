"""The fastest dense linear of torch on a CPU: weights in oneDNN's own layout, as torch.compile uses it."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class PrepackedLinear(nn.Module):
    """y = x Wᵀ + b with a copy of W in oneDNN's layout.

    Args:
        linear: on the CPU.

    Raises:
        RuntimeError: this torch or this processor has no such layout for the dtype.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self._bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Output (…, O) for inputs (…, I)."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y


def prepacked(model: Model) -> Model | None:
    """A second model with prepacked linears, which shares all other tensors; None if oneDNN has no layout for it."""
    if next(model.parameters()).device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    try:
        for name, module in list(other.named_modules()):
            if type(module) is nn.Linear:
                other.set_submodule(name, PrepackedLinear(module))
        with torch.inference_mode():
            other(torch.zeros(1, 1, dtype=torch.int64, device="cpu"))
    except (RuntimeError, AttributeError):
        return None
    return other
