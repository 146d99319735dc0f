"""The products of a block with its prunable matrices, observed in torch's functions, whichever module calls them.

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

# Functions that multiply: position and name of the input and of the weight, and the axis of the weight summed over.
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

Receiver = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class _Factors:
    """The factors of a product.

    Attributes:
        x: the input (..., I).
        weight: a matrix, or a stack of matrices.
        axis: axis of the weight that is summed over.
        left: whether the weight is the left factor; the output is then (..., O, T).
    """

    x: Tensor
    weight: Tensor
    axis: int
    left: bool = False

    def of_experts(self) -> Tensor:
        """The inputs (E, T, I) of all experts; they may be the same for each."""
        return self.x.expand(len(self.weight), *self.x.shape[-2:])


class Products(TorchFunctionMode):
    """While open, reports every product with a matrix of the block. A matrix is recognised by its memory.

    Args:
        block: owner of the parameters.
        prunables: its matrices by name.
        inputs: called before each product with the name of the matrix and the input (..., I).
        gradients: called in the backward pass with the name and the gradient (..., O) at the product; of an expert, at
            the tokens that it has an input of.
    """

    def __init__(
        self,
        block: nn.Module,
        prunables: Mapping[str, Prunable],
        inputs: Receiver | None = None,
        gradients: Receiver | None = None,
    ) -> None:
        super().__init__()
        self._prunables = prunables
        self._inputs, self._gradients = inputs, gradients
        self._places: list[tuple[int, int, str]] = []  # first byte, bytes, name
        self._steps: dict[str, int] = {}  # stride from one input channel to the next
        parameters = dict(block.named_parameters())
        for name, prunable in prunables.items():
            matrix = prunable.of(parameters[prunable.parameter])
            self._places.append((matrix.data_ptr(), matrix.nbytes, name))
            self._steps[name] = matrix.stride(1)
        self._places.sort()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        factors, matrices = self._recognise(func, args, kwargs)
        if factors is None:
            return func(*args, **kwargs)
        for name, expert in matrices if self._inputs else ():
            assert self._inputs is not None
            self._inputs(name, factors.x if expert is None else factors.of_experts()[expert])
        if self._gradients and not torch.is_grad_enabled():
            self._refuse_without_gradients([name for name, _ in matrices])
        y = func(*args, **kwargs)
        if self._gradients and y.requires_grad:
            y.register_hook(partial(self._report_gradient, matrices, factors))
        return y

    def _refuse_without_gradients(self, names: list[str]) -> None:
        """Refuse experts that the model's own code keeps out of the backward pass, as if nothing depended on them.

        Raises:
            BesaError: one of the matrices is an expert's.
        """
        for name in names:
            if self._prunables[name].routed:
                raise BesaError(
                    f"The model's own code computes {name} without gradients, which this recipe needs: take one that "
                    "needs none, such as wanda."
                )

    def _recognise(
        self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[_Factors | None, list[tuple[str, int | None]]]:
        """The factors of a product, and the names of the block's matrices among them; (None, []) without such matrices.

        For experts that are multiplied at once, each name comes with the expert's position in the stack.
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
        """The name of a matrix; None if the block does not have it, or if the product sums over its output channels.

        Raises:
            BesaError: the product sums over the output channels of an expert.
        """
        place = bisect_right(self._places, matrix.data_ptr(), key=lambda place: place[0]) - 1
        if place < 0 or matrix.data_ptr() >= sum(self._places[place][:2]):
            return None
        name = self._places[place][2]
        prunable = self._prunables[name]
        transposed = matrix.stride(factors.axis) != self._steps[name] and min(matrix.shape[-2:]) > 1
        if not transposed and factors.x.shape[-1] == prunable.columns:
            return name
        if prunable.routed:  # other matrices are refused later because they saw no token
            raise BesaError(
                f"{name} is multiplied in transposed form, which besa does not support: the model cannot be pruned."
            )
        return None

    def _report_gradient(self, matrices: list[tuple[str, int | None]], factors: _Factors, gradient: Tensor) -> None:
        assert self._gradients is not None
        gradient = gradient.transpose(-1, -2) if factors.left else gradient
        for name, expert in matrices:
            if expert is None:
                self._gradients(name, gradient)
            else:  # some families give every expert all tokens, as zeros where the router chose another
                chosen_T = factors.of_experts()[expert].detach().any(dim=-1)
                self._gradients(name, gradient[expert][chosen_T])


def _factors(func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Iterator[_Factors]:
    """The ways to read a function call as a product of an input with a weight."""
    if func is torch.einsum:
        yield from _einsum_factors(*args)
    elif func in PRODUCTS:
        *places, axis = PRODUCTS[func]
        x, weight = (args[place] if place < len(args) else kwargs[name] for place, name in places)
        if weight.dim() in (2, 3):
            yield _Factors(x, weight, axis)
        if axis == -2 and x.dim() in (2, 3) and weight.dim() > 1:
            yield _Factors(weight.transpose(-1, -2), x, -1, left=True)


def _einsum_factors(equation: Any, *operands: Any) -> Iterator[_Factors]:
    """The factors of an ``einsum`` that sums over the last axis of an input (..., I) and gives (..., O).

    A matrix that appears only in other sums counts as not seen.
    """
    pair = operands[0] if len(operands) == 1 else operands
    if not isinstance(equation, str) or len(pair) != 2:
        return
    terms, _, result = equation.replace(" ", "").partition("->")
    named = list(zip(pair, terms.split(","), strict=True))
    for (x, x_axes), (weight, w_axes) in (named, named[::-1]):
        stacked = len(w_axes) == 3 and w_axes[0] == x_axes[0] == result[:1]
        matrix = w_axes[1:] if stacked else w_axes
        if len(matrix) == 2 and result and set(matrix) == {x_axes[-1], result[-1]} and x_axes[-1] not in result:
            yield _Factors(x, weight, w_axes.index(x_axes[-1]) - len(w_axes))
