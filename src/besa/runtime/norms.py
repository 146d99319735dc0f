"""RMSNorm of packed models: while they decode, besa's kernel computes it (`besa.kernels.norm`).

Model families compute RMSNorm in several ways, each in a class of its own. Which one a module computes is found by
trying it. A module keeps its class and its weight; only its `forward` is replaced, and falls back to the family's own
where the kernel cannot be used.

Shape suffixes: N rows of x, I columns.
"""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from besa.kernels import norm
from besa.kernels.decoding import Norm
from besa.kernels.norm import Form
from besa.runtime.derivatives import wanted
from besa.runtime.kept import untouched
from besa.runtime.tracing import tracing

FEW = 1 << 16  # numbers of x, at most: for more, torch's threads share the work
SIZES = (1e-3, 1e-2, 0.1, 1.0, 10.0)  # of the rows by which a module is tried: ε matters in the small ones
CLOSE = {torch.bfloat16: 2**-7, torch.float32: 1e-5}  # relative errors that rounding explains
SAME = 0.95  # share of numbers of bfloat16 that are equal to the last digit; another rounding changes a third of them


def speed_up(model: nn.Module) -> None:
    """Let the norms of a model use besa's kernel where it computes the same."""
    for module in model.modules():
        numbers = [name for name, value in vars(module).items() if isinstance(value, float)]
        if "norm" in type(module).__name__.lower() and len(numbers) == 1 and "forward" not in vars(module):
            form = _form(module, numbers[0])
            if form is not None and untouched(type(module)):
                module.forward = partial(_forward, module, form=form, epsilon=numbers[0])  # which pickle can write


def restore(model: nn.Module) -> None:
    """Undo `speed_up`."""
    for module in model.modules():
        own = vars(module).get("forward")
        if isinstance(own, partial) and own.func is _forward:
            del module.forward


def kernel_of(module: nn.Module) -> Norm | None:
    """The arguments of a module's kernel; None for a module that does not use it."""
    own = vars(module).get("forward")
    if not isinstance(own, partial) or own.func is not _forward:
        return None
    epsilon, form = own.keywords["epsilon"], own.keywords["form"]
    return Norm(module.weight, getattr(module, epsilon), form)  # type: ignore[arg-type]  # nn.Module's


def _forward(module: Any, *inputs: Tensor, form: Form, epsilon: str, **named: Any) -> Any:
    """What the family's own `forward` gives; `epsilon` is the name of the attribute that is ε."""
    if len(inputs) == 1 and not named and not tracing() and untouched(type(module)):
        x, weight_I = *inputs, module.weight
        if not wanted(x, weight_I) and x.numel() <= FEW and norm.serves(x, weight_I):
            return norm.normed(x, weight_I, getattr(module, epsilon), form)
    return type(module).forward(module, *inputs, **named)


@torch.no_grad()
def _form(module: nn.Module, epsilon: str) -> Form | None:
    """How a module computes RMSNorm; None if it computes something else, or there is no kernel for it.

    Args:
        module: the norm.
        epsilon: name of its attribute that is ε.
    """
    tensors = module.state_dict(keep_vars=True)
    weight = tensors.get("weight")
    if len(tensors) != 1 or weight is None or weight.dim() != 1 or len(signature(module.forward).parameters) != 1:
        return None
    if weight.device.type != "cpu":
        return None
    generator = torch.Generator().manual_seed(0)
    with torch.device("cpu"):  # whatever the program's default is
        tried_I = torch.randn(len(weight), generator=generator).to(weight.dtype)
        x_NI = torch.randn(len(SIZES), len(weight), generator=generator) * torch.tensor(SIZES)[:, None]
    x_NI = x_NI.to(weight.dtype)
    if not norm.serves(x_NI, tried_I):
        return None
    usual_NI = functional_call(module, {"weight": tried_I}, (x_NI,))
    number = getattr(module, epsilon)
    return next((form for form in norm.FORMS if _same(norm.normed(x_NI, tried_I, number, form), usual_NI)), None)


def _same(found_NI: Tensor, usual_NI: Tensor) -> bool:
    if found_NI.dtype != usual_NI.dtype or found_NI.shape != usual_NI.shape:
        return False
    equal = float((found_NI == usual_NI).float().mean())
    close = CLOSE[found_NI.dtype]
    return (found_NI.dtype == torch.float32 or equal >= SAME) and torch.allclose(found_NI, usual_NI, rtol=close, atol=0)
