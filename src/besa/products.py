"""Watching products with a weight go by, whatever module computes them, and telling the weight by its memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

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


class Products(TorchFunctionMode):
    """While open, tells `seen` of each product of a block with one of its prunable matrices."""

    def __init__(self, block: nn.Module, prunables: Mapping[str, Prunable]) -> None:
        super().__init__()
        self._places: list[tuple[int, int, str]] = []  # first byte, bytes, name
        parameters = dict(block.named_parameters())
        for name, prunable in prunables.items():
            matrix = prunable.of(parameters[prunable.parameter])
            self._places.append((matrix.data_ptr(), matrix.nbytes, name))
        self._places.sort()

    def seen(self, name: str, x: Tensor) -> None:
        """Told that the matrix of that name is about to be multiplied by inputs x (…, I)."""
        raise NotImplementedError

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in PRODUCTS:
            at_input, at_weight = PRODUCTS[func]
            if len(args) > at_weight:
                self._observe(args[at_input], args[at_weight])
        return func(*args, **(kwargs or {}))

    def _observe(self, x: Tensor, weight: Tensor) -> None:
        place = bisect_right(self._places, weight.data_ptr(), key=lambda place: place[0]) - 1
        if place < 0 or weight.data_ptr() >= sum(self._places[place][:2]):
            return
        if weight.dim() == 3:  # all experts, each with tokens of its own: (E, T, I)
            for x_TI, matrix in zip(x, weight, strict=True):
                self._observe(x_TI, matrix)
        else:
            self.seen(self._places[place][2], x)
