"""The products of a block with its prunable matrices, seen where they are computed, whatever module computes them.

Shape suffixes: E experts, T tokens, C channels, I input channels, O output channels.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from besa.errors import BesaError
from besa.models.prunable import Prunable

# Where a decoder multiplies by a weight, and at which places the input and the weight stand.
PRODUCTS: dict[Any, tuple[int, int]] = {
    functional.linear: (0, 1),  # nn.Linear, experts
    torch.addmm: (1, 2),  # Conv1D
    torch.matmul: (0, 1),
    Tensor.matmul: (0, 1),
    Tensor.__matmul__: (0, 1),  # Falcon's linear
    torch.bmm: (0, 1),  # all experts at once
}

Told = Callable[[str, Tensor], None]


class Products(TorchFunctionMode):
    """While open, tells of every product with one of a block's matrices; a matrix is known by its memory.

    Args:
        block: whose parameters are multiplied by.
        prunables: its matrices by name.
        inputs: called before each product with the name of the matrix and the input (..., I).
        outputs: called after it with the name and the output (..., O).
    """

    def __init__(
        self,
        block: nn.Module,
        prunables: Mapping[str, Prunable],
        inputs: Told | None = None,
        outputs: Told | None = None,
    ) -> None:
        super().__init__()
        self._prunables = prunables
        self._inputs, self._outputs = inputs, outputs
        self._places: list[tuple[int, int, str]] = []  # first byte, bytes, name
        parameters = dict(block.named_parameters())
        for name, prunable in prunables.items():
            matrix = prunable.of(parameters[prunable.parameter])
            self._places.append((matrix.data_ptr(), matrix.nbytes, name))
        self._places.sort()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in PRODUCTS or len(args) <= max(PRODUCTS[func]):
            return func(*args, **(kwargs or {}))
        x, weight = (args[place] for place in PRODUCTS[func])
        if self._inputs:
            self._tell(self._inputs, x, weight, x)
        y = func(*args, **(kwargs or {}))
        if self._outputs:
            self._tell(self._outputs, x, weight, y)
        return y

    def _tell(self, told: Told, x: Tensor, weight: Tensor, shown: Tensor) -> None:
        place = bisect_right(self._places, weight.data_ptr(), key=lambda place: place[0]) - 1
        if place < 0 or weight.data_ptr() >= sum(self._places[place][:2]):
            return
        if weight.dim() == 3:  # all experts, each with tokens of its own: (E, T, I)
            for x_TI, matrix, shown_TC in zip(x, weight, shown, strict=True):
                self._tell(told, x_TI, matrix, shown_TC)
            return
        name = self._places[place][2]
        if x.shape[-1] != self._prunables[name].columns:
            raise BesaError(f"{name} is multiplied the other way round than besa expects: leave it out with --skip.")
        told(name, shown)
