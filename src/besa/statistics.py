"""What importance and reconstruction know of a matrix's input: channel norms, and the Gram matrix when asked for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@dataclass
class InputStatistics:
    """Sums over all calibration tokens x (I,) that reached one linear.

    Attributes:
        squares_I: Σ x², float64.
        gram_II: Σ x xᵀ, float32, or None where no method of the recipe needs it.
        tokens: how many tokens were seen.
    """

    squares_I: Tensor
    gram_II: Tensor | None
    tokens: int = 0
    _inverses: dict[float, Tensor] = field(default_factory=dict, repr=False)  # by damping

    @classmethod
    def empty(cls, width: int, gram: bool, device: torch.device) -> InputStatistics:
        """Statistics of no tokens for inputs of `width` channels."""
        gram_II = torch.zeros(width, width, device=device) if gram else None
        return cls(torch.zeros(width, dtype=torch.float64, device=device), gram_II)

    def add(self, x_TI: Tensor) -> None:
        """Count the tokens `x_TI` (tokens, channels) of any float dtype in."""
        self._inverses.clear()
        x_TI = x_TI.float()
        self.squares_I += x_TI.square().sum(dim=0).double()
        if self.gram_II is not None:
            self.gram_II.addmm_(x_TI.T, x_TI)
        self.tokens += x_TI.shape[0]

    @property
    def reached(self) -> bool:
        """Whether any token came; one that is all zeros (of another expert, where all compute all tokens) is none."""
        return bool(self.squares_I.any())

    def hessian(self, damping: float) -> Tensor:
        """H = Σ x xᵀ (I, I), its diagonal raised by `damping` × its mean; 1 where a channel is always zero."""
        assert self.gram_II is not None, "the recipe did not ask for the Gram matrix"
        hessian_II = self.gram_II.clone()
        diagonal_I = hessian_II.diagonal()
        diagonal_I[diagonal_I == 0] = 1.0
        diagonal_I += damping * diagonal_I.mean()
        return hessian_II

    def inverse_hessian(self, damping: float) -> Tensor:
        """Inverse (I, I) of the damped Hessian, by Cholesky; kept, as linears with one input share it.

        Raises:
            BesaError: the damped Hessian is not positive definite.
        """
        if damping in self._inverses:
            return self._inverses[damping]
        factor_II, failed = torch.linalg.cholesky_ex(self.hessian(damping))
        if failed:
            raise BesaError(
                f"The Hessian of a linear's inputs is not positive definite at damping {damping:g}: "
                "use more calibration samples or a larger damping in the recipe."
            )
        return self._inverses.setdefault(damping, torch.cholesky_inverse(factor_II))


@contextmanager
def collect(block: nn.Module, prunables: Mapping[str, Prunable], gram: bool) -> Iterator[dict[str, InputStatistics]]:
    """While open, gather the input statistics of each of `prunables` from every forward pass through `block`.

    Matrices that are handed the very same tensor (q, k and v; gate and up) share one object, so the work is done once.
    What no token reached (experts that were not chosen) has statistics of zero tokens afterwards.
    """
    observer = _Observer(block, prunables, gram)
    with observer:
        yield observer.statistics
    parameters = dict(block.named_parameters())
    for name, prunable in prunables.items():
        device = parameters[prunable.parameter].device
        observer.statistics.setdefault(name, InputStatistics.empty(prunable.columns, gram, device))


class _Observer(TorchFunctionMode):
    """Watches products with a weight go by, whatever module computes them, and tells the weight by its memory."""

    def __init__(self, block: nn.Module, prunables: Mapping[str, Prunable], gram: bool) -> None:
        super().__init__()
        self.statistics: dict[str, InputStatistics] = {}
        self._prunables = prunables
        self._gram = gram
        self._last: tuple[Tensor, InputStatistics, set[str]] | None = None  # input, statistics, what it has reached
        self._places: list[tuple[int, int, str]] = []  # first byte, bytes, name
        parameters = dict(block.named_parameters())
        for name, prunable in prunables.items():
            matrix = prunable.of(parameters[prunable.parameter])
            self._places.append((matrix.data_ptr(), matrix.nbytes, name))
        self._places.sort()

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
            self._add(self._places[place][2], x)

    def _add(self, name: str, x: Tensor) -> None:
        if x.shape[-1] != self._prunables[name].columns:
            raise BesaError(f"{name} is multiplied the other way round than besa expects: leave it out with --skip.")
        if self._last is not None and x is self._last[0] and name not in self._last[2]:
            self._last[2].add(name)
            if self.statistics.setdefault(name, self._last[1]) is self._last[1]:
                return
        if name not in self.statistics:
            self.statistics[name] = InputStatistics.empty(x.shape[-1], self._gram, x.device)
        self.statistics[name].add(x.detach().reshape(-1, x.shape[-1]))
        self._last = (x, self.statistics[name], {name})
