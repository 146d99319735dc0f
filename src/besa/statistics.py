"""What importance and reconstruction know of a linear's input: channel norms, and the Gram matrix when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from besa.errors import BesaError


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
def collect(linears: Mapping[str, nn.Module], gram: bool) -> Iterator[dict[str, InputStatistics]]:
    """While open, gather the input statistics of each of `linears` from every forward pass through them.

    Linears that are handed the very same tensor (q, k and v; gate and up) share one object, so the work is done once.
    """
    statistics: dict[str, InputStatistics] = {}
    last: tuple[Tensor, InputStatistics, set[str]] | None = None  # input, its statistics, linears it has reached

    def observe(name: str, x: Tensor) -> None:
        nonlocal last
        if last is not None and x is last[0] and name not in last[2]:
            statistics.setdefault(name, last[1])
            last[2].add(name)
            return
        if name not in statistics:
            statistics[name] = InputStatistics.empty(x.shape[-1], gram, x.device)
        statistics[name].add(x.detach().reshape(-1, x.shape[-1]))
        last = (x, statistics[name], {name})

    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: observe(name, inputs[0]))
        for name, module in linears.items()
    ]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
