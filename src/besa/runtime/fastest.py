"""Torch's fastest dense linear on this CPU, so that comparisons with besa's kernels are fair.

That is a weight in oneDNN's own layout, as torch.compile uses it; or float32 products, where oneDNN has none of the
weight's dtype.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from besa.counting import widening
from besa.runtime.timings import PREPACKED, WIDENED

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


class WidenedLinear(nn.Module):
    """y = x Wᵀ + b with many rows of x multiplied in float32.

    Args:
        linear: on the CPU, whose weight and bias it shares.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Output (…, O) for inputs (…, I)."""
        y = widening.linear(x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], len(self.weight))
        return y if self.bias is None else y + self.bias


def fastest(model: Model) -> tuple[str, Model] | None:
    """The name of torch's fastest form, and a second model in it, which shares all other tensors.

    None where torch has nothing faster than the model as it is.
    """
    first = next(model.parameters())
    if first.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    form, linear = (WIDENED, WidenedLinear) if first.dtype in widening.slow() else (PREPACKED, PrepackedLinear)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, shared)
    try:
        for name, module in list(other.named_modules()):
            if type(module) is nn.Linear:
                other.set_submodule(name, linear(module))
        with torch.inference_mode():
            other(torch.zeros(1, 1, dtype=torch.int64, device="cpu"))
    except (RuntimeError, AttributeError):
        return None
    return form, other
