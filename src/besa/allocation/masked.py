"""Linears whose masks change at every step: the weights the block runs with, and the gradient of beta through them.

Shape suffixes: O rows, I columns, D candidate pruning rates, R rate groups (rows, or linears whose rows share a rate).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from besa import kernels
from besa.allocation.problem import RankedLinear
from besa.allocation.rates import Rates, candidate_bins


class MaskedLinears:
    """Linears that learn together, straight through their hard masks (eqs. 4 to 6).

    Args:
        linears: by full name.
        rates: of their rows, or of themselves.
        dtype: of the weights that the block runs with.

    Attributes:
        linears: what there is of each, by full name.
        rates: what is learned.
    """

    def __init__(self, linears: dict[str, RankedLinear], rates: Rates, dtype: torch.dtype) -> None:
        self.linears = {name: _Masked.of(linear, rates.rates_D, dtype) for name, linear in linears.items()}
        self.rates = rates

    @torch.no_grad()
    def weights(self, counts_R: Tensor) -> dict[str, Tensor]:
        """W ⊙ M (O, I) by full name, without the `counts_R` lowest ranks of each row.

        They are leaves, the same tensors at every call, whose gradients `gradient` is made of.
        """
        for linear, counts_O in zip(self.linears.values(), self._by_row(counts_R), strict=True):
            kernels.masked(linear.w_OI, linear.ranks_OI, counts_O.contiguous(), linear.masked_OI)
        return {name: linear.masked_OI for name, linear in self.linears.items()}

    def gradient(self) -> Tensor:
        """dL/dbeta (R, D) by the last backward pass: −Σ_j dL/dM_j · [candidate d prunes rank j]."""
        sums = [linear.sums_OD for linear in self.linears.values()]
        if not self._per_row:
            sums = [sums_OD.sum(dim=0, keepdim=True) for sums_OD in sums]
        return torch.cat(sums).cumsum(dim=1).neg_()

    def row_rates(self) -> dict[str, Tensor]:
        """Learned rate of each row (O,) by full name, float64 on the CPU."""
        with torch.no_grad():
            alpha_R = self.rates.alpha(self.rates.beta()).double().cpu()
        return dict(zip(self.linears, self._by_row(alpha_R), strict=True))

    @property
    def _per_row(self) -> bool:
        return len(self.rates.width_R) > len(self.linears)

    def _by_row(self, x_R: Tensor) -> list[Tensor]:
        """What belongs to the rows (O,) of each linear, of something that belongs to rate groups."""
        rows = [len(linear.w_OI) for linear in self.linears.values()]
        if self._per_row:
            return list(x_R.split(rows))
        return [x.expand(n) for x, n in zip(x_R, rows, strict=True)]


@dataclass(frozen=True)
class _Masked:
    """One of them: constants, the leaf, and the leaf's gradient summed by the first candidate that prunes a weight."""

    w_OI: Tensor
    ranks_OI: Tensor
    bins_I: Tensor
    masked_OI: Tensor
    sums_OD: Tensor

    @classmethod
    def of(cls, linear: RankedLinear, rates_D: Tensor, dtype: torch.dtype) -> _Masked:
        w_OI = linear.w_OI.to(dtype).contiguous()
        rows, columns = w_OI.shape
        sums_OD = torch.zeros(rows, len(rates_D), device=w_OI.device)
        masked_OI = torch.empty_like(w_OI).requires_grad_()
        masked = cls(w_OI, linear.ranks_OI, candidate_bins(rates_D, columns), masked_OI, sums_OD)
        masked_OI.register_post_accumulate_grad_hook(masked._take)
        return masked

    def _take(self, leaf: Tensor) -> None:
        """Sum up the gradient and drop it, so that those of two weights are never there together."""
        assert leaf.grad is not None
        kernels.binned(leaf.grad.contiguous(), self.w_OI, self.ranks_OI, self.bins_I, self.sums_OD)
        leaf.grad = None
