"""Linears that compute nothing but x Wᵀ + b, so that another layer may stand in for them.

Families make linears of their own from `nn.Linear`. Some add the bias in another way, others divide the inputs into
groups or add a second product. What one computes is found by trying it.

Shape suffixes: N sequences, T tokens, I columns (input channels).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

SHAPE = (4, 8)  # of the weight that a linear is tried with


def plain_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a model, by name, that compute this alone; the model may be without memory for weights."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: linear for name, linear in linears.items() if type(linear) is nn.Linear or _is_plain(linear)}


@torch.no_grad()
def _is_plain(linear: nn.Linear) -> bool:
    """Whether a linear of a family's own computes as torch's."""
    rows, columns = SHAPE
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        sizes = {"weight": SHAPE} if linear.bias is None else {"weight": SHAPE, "bias": (rows,)}
        if linear.state_dict(keep_vars=True).keys() != sizes.keys():
            return False
        tensors: dict[str, Tensor] = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
        x_NTI = torch.randn(2, 3, columns, generator=generator)
        try:
            found = functional_call(linear, tensors, (x_NTI,))
        except Exception:  # whatever the family's own code raises for such sizes
            return False
        expected = nn.functional.linear(x_NTI, **tensors)
    if not isinstance(found, Tensor) or (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    return torch.allclose(found, expected, atol=1e-5)
