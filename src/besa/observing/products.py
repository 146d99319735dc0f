"""The products of a block with its prunable matrices, seen where they are computed, whatever module computes them.

Shape suffixes: E experts, T tokens, C channels, I input channels, O output channels.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from besa.errors import BesaError
from besa.models.prunable import Prunable

# Where a decoder multiplies: places and names of the input and of the weight, and which axis of the weight is summed.
PRODUCTS: dict[Any, tuple[tuple[int, str], tuple[int, str], int]] = {
    functional.linear: ((0, "input"), (1, "weight"), -1),  # nn.Linear, experts
    torch.addmm: ((1, "mat1"), (2, "mat2"), -2),  # Conv1D
    Tensor.addmm: ((1, "mat1"), (2, "mat2"), -2),
    torch.matmul: ((0, "input"), (1, "other"), -2),
    Tensor.matmul: ((0, "self"), (1, "other"), -2),
    Tensor.__matmul__: ((0, "self"), (1, "other"), -2),  # Falcon's linear
    torch.mm: ((0, "input"), (1, "mat2"), -2),
    Tensor.mm: ((0, "self"), (1, "mat2"), -2),
    torch.bmm: ((0, "input"), (1, "mat2"), -2),  # all experts at once
    Tensor.bmm: ((0, "self"), (1, "mat2"), -2),
    torch.baddbmm: ((1, "batch1"), (2, "batch2"), -2),
    Tensor.baddbmm: ((1, "batch1"), (2, "batch2"), -2),
}

Told = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class _Factors:
    """What a product is made of.

    Attributes:
        x: the input (..., I).
        weight: a matrix, or a stack of them.
        axis: of the weight, which is summed over.
        left: the weight stands on the left, so that the output is (..., O, T).
    """

    x: Tensor
    weight: Tensor
    axis: int
    left: bool = False

    def of_experts(self) -> Tensor:
        """The inputs (E, T, I) of all experts, which may be the same for each."""
        return self.x.expand(len(self.weight), *self.x.shape[-2:])


class Products(TorchFunctionMode):
    """While open, tells of every product with one of a block's matrices; a matrix is known by its memory.

    Args:
        block: whose parameters are multiplied by.
        prunables: its matrices by name.
        inputs: called before each product with the name of the matrix and the input (..., I).
        gradients: called with the name and the gradient (..., O) at the product, when that comes back.
    """

    def __init__(
        self,
        block: nn.Module,
        prunables: Mapping[str, Prunable],
        inputs: Told | None = None,
        gradients: Told | None = None,
    ) -> None:
        super().__init__()
        self._prunables = prunables
        self._inputs, self._gradients = inputs, gradients
        self._places: list[tuple[int, int, str]] = []  # first byte, bytes, name
        self._steps: dict[str, int] = {}  # from one input channel to the next
        parameters = dict(block.named_parameters())
        for name, prunable in prunables.items():
            matrix = prunable.of(parameters[prunable.parameter])
            self._places.append((matrix.data_ptr(), matrix.nbytes, name))
            self._steps[name] = matrix.stride(1)
        self._places.sort()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        factors, matrices = self._found(func, args, given)
        if factors is None:
            return func(*args, **given)
        for name, expert in matrices if self._inputs else ():
            assert self._inputs is not None
            self._inputs(name, factors.x if expert is None else factors.of_experts()[expert])
        y = func(*args, **given)
        if self._gradients and y.requires_grad:
            y.register_hook(partial(self._hear, matrices, factors.left))
        return y

    def _found(
        self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[_Factors | None, list[tuple[str, int | None]]]:
        """The factors of a product, and the names of the block's matrices among them: none where there are none.

        Of experts that are multiplied at once, the place of each stands beside its name.
        """
        for factors in _factors(func, args, kwargs):
            each: list[tuple[str | None, int | None]]
            if factors.weight.dim() == 3 and len(factors.weight) > 1:
                each = [(self._name(matrix, factors), place) for place, matrix in enumerate(factors.weight)]
            else:
                each = [(self._name(factors.weight, factors), None)]
            if matrices := [(name, place) for name, place in each if name is not None]:
                return factors, matrices
        return None, []

    def _name(self, matrix: Tensor, factors: _Factors) -> str | None:
        """What the block calls a matrix; None for one that it does not have, or of which it sums over other channels.

        Raises:
            BesaError: they are of an expert.
        """
        place = bisect_right(self._places, matrix.data_ptr(), key=lambda place: place[0]) - 1
        if place < 0 or matrix.data_ptr() >= sum(self._places[place][:2]):
            return None
        name = self._places[place][2]
        prunable = self._prunables[name]
        turned = matrix.stride(factors.axis) != self._steps[name] and min(matrix.shape[-2:]) > 1
        if not turned and factors.x.shape[-1] == prunable.columns:
            return name
        if prunable.routed:  # no other is taken for one that saw no token
            raise BesaError(f"{name} is multiplied the other way round than besa expects: it cannot be pruned.")
        return None

    def _hear(self, matrices: list[tuple[str, int | None]], left: bool, gradient: Tensor) -> None:
        assert self._gradients is not None
        gradient = gradient.transpose(-1, -2) if left else gradient
        for name, expert in matrices:
            self._gradients(name, gradient if expert is None else gradient[expert])


def _factors(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Iterator[_Factors]:
    """The ways in which a function call may be a product with a weight."""
    if func is torch.einsum:
        yield from _summed(*args)
    elif func in PRODUCTS:
        *places, axis = PRODUCTS[func]
        x, weight = (args[place] if place < len(args) else kwargs[name] for place, name in places)
        if weight.dim() in (2, 3):
            yield _Factors(x, weight, axis)
        if axis == -2 and x.dim() in (2, 3) and weight.dim() > 1:
            yield _Factors(weight.transpose(-1, -2), x, -1, left=True)


def _summed(equation: Any, *operands: Any) -> Iterator[_Factors]:
    """What an ``einsum`` multiplies, if it sums over the last axis of an input (..., I) and gives (..., O).

    A matrix that is only multiplied in other sums counts as one that is not seen.
    """
    given = operands[0] if len(operands) == 1 else operands
    if not isinstance(equation, str) or len(given) != 2:
        return
    terms, _, result = equation.replace(" ", "").partition("->")
    named = list(zip(given, terms.split(","), strict=True))
    for (x, axes), (weight, own) in (named, named[::-1]):
        stacked = len(own) == 3 and own[0] == axes[0] == result[:1]
        matrix = own[1:] if stacked else own
        if len(matrix) == 2 and result and set(matrix) == {axes[-1], result[-1]} and axes[-1] not in result:
            yield _Factors(x, weight, own.index(axes[-1]) - len(own))
