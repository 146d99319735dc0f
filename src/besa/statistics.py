"""What importance and reconstruction know of a matrix's input: channel norms, and the Gram matrix when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from besa.errors import BesaError
from besa.models.prunable import Prunable
from besa.products import Products


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


class _Observer(Products):
    """Gathers the statistics of what every matrix is multiplied by."""

    def __init__(self, block: nn.Module, prunables: Mapping[str, Prunable], gram: bool) -> None:
        super().__init__(block, prunables)
        self.statistics: dict[str, InputStatistics] = {}
        self._prunables = prunables
        self._gram = gram
        self._last: tuple[Tensor, InputStatistics, set[str]] | None = None  # input, statistics, what it has reached

    def seen(self, name: str, x: Tensor) -> None:
        """See `Products`."""
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
