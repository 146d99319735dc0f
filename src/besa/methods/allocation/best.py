"""The parameters that are best on sequences which nothing is learned from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Best:
    """Parameters as they were when their held-out error was lowest, from their start on.

    Args:
        parameters: that learn.
        error: the held-out error of the present parameters, the same on all ranks.
        in_vain: so many looks in a row that find nothing better are enough.
    """

    def __init__(self, parameters: Sequence[Tensor], error: Callable[[], float], in_vain: int) -> None:
        self._parameters, self._error, self._in_vain = parameters, error, in_vain
        self._kept = [parameter.detach().clone() for parameter in parameters]
        self._lowest, self._since = error(), 0

    @property
    def passed(self) -> bool:
        """Whether the best seems to lie behind."""
        return self._since >= self._in_vain

    def look(self) -> None:
        """Measure the present parameters, and keep them if they are better than all before."""
        error = self._error()
        if not error < self._lowest:
            self._since += 1
            return
        self._lowest, self._since = error, 0
        for kept, parameter in zip(self._kept, self._parameters, strict=True):
            kept.copy_(parameter.detach())

    @torch.no_grad()
    def restore(self) -> None:
        """Make the parameters again what they were at their best."""
        for kept, parameter in zip(self._kept, self._parameters, strict=True):
            parameter.copy_(kept)
