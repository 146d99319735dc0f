"""Learned pruning rates: from coefficients beta to the pruned ranks of a row, and back to gradients (eqs. 3 to 6).

Shape suffixes: O rows, I columns, D candidate pruning rates, R rate groups (rows, or linears whose rows share
a rate).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from besa import kernels
from besa.counting.precision import widest


@cache
def candidate_rates(step: float) -> Tensor:
    """Candidate pruning rates p_d = 0, step, …, 1 (D,), float64; the step is adjusted to divide 1 evenly.

    The paper sets the last coefficient to zero so that the most important weight always stays. Besa keeps it, so that
    it can reach any sparsity below 1.
    """
    intervals = round(1 / step)
    return torch.arange(intervals + 1, dtype=torch.float64) / intervals


def candidate_ranks(rates_D: Tensor, width: int | Tensor) -> Tensor:
    """How many ranks of a row of `width` weights each candidate prunes, ⌈p_d·I⌉; (D,), int64.

    Eq. 4 prunes rank j (from 0) at candidate d if j < p_d·I. Products within 1e-6 of an integer count as that integer:
    0.07 × 100 is 7 ranks, not 8. This needs rates in float64.
    """
    return (rates_D * width - 1e-6).ceil().long()


def candidate_bins(rates_D: Tensor, width: int) -> Tensor:
    """The first candidate that prunes each rank of a row of `width` weights; (I,), int16.

    With these bins, dL/dbeta_d = −Σ_j dL/dM_j · [candidate d prunes rank j] is a running sum over bins.
    """
    ranks_I = torch.arange(width, device=rates_D.device)
    return torch.searchsorted(candidate_ranks(rates_D, width), ranks_I, right=True).to(torch.int16)


@cache
def starting_logits(step: float, target: float, width: float) -> list[float]:
    """Logits (D,) of a bell of standard deviation `width`, placed so that alpha (eq. 3) is the target.

    Args:
        step: distance of the candidate pruning rates.
        target: the sparsity.
        width: in units of sparsity.
    """
    rates_D = candidate_rates(step)
    steep = 20.0 * len(rates_D)  # neighbours differ by e²⁰, which brings alpha to 0 or to 1
    low, high = -steep, width**-2 + steep
    for _ in range(100):
        slope = (low + high) / 2  # centre of the bell / width²
        logits_D = slope * rates_D - rates_D**2 / (2 * width**2)
        low, high = (slope, high) if float(logits_D.softmax(-1) @ rates_D) < target else (low, slope)
    logits: list[float] = (logits_D - logits_D.max()).float().tolist()
    return logits


@dataclass(frozen=True)
class Rates:
    """Pruning rates that are learned together to meet one sparsity.

    Attributes:
        logits_RD: the parameters; beta is their softmax.
        rates_D: candidate pruning rates p_d, as wide as the device computes.
        width_R: weights in a row of each group, likewise.
        share_R: share of each group in all weights, float32.
        sparsity: the target.
        mask: the mask rule, ``count`` or ``probability``.
    """

    logits_RD: Tensor
    rates_D: Tensor
    width_R: Tensor
    share_R: Tensor
    sparsity: float
    mask: str

    @classmethod
    def start(
        cls,
        shapes: list[tuple[int, int]],
        sparsity: float,
        *,
        per_row: bool,
        step: float,
        spread: float,
        mask: str,
        device: torch.device,
    ) -> Rates:
        """Rates that all start at the target.

        Args:
            shapes: rows and columns of each linear.
            sparsity: the target.
            per_row: each row has its own rate; else each linear.
            step: distance of the candidate pruning rates.
            spread: standard deviation of the first beta around the target.
            mask: the mask rule.
            device: where the rates are learned.
        """
        rates_D = candidate_rates(step)
        groups = [(rows if per_row else 1, rows * columns, columns) for rows, columns in shapes]
        width_R = torch.cat([torch.full((n,), float(columns), device=device) for n, _, columns in groups])
        share_R = torch.cat([torch.full((n,), weights / n, device=device) for n, weights, _ in groups])
        logits_D = torch.tensor(starting_logits(step, sparsity, spread)).to(device)
        logits_RD = logits_D.repeat(len(width_R), 1).requires_grad_()
        dtype = widest(device)
        return cls(logits_RD, rates_D.to(device, dtype), width_R.to(dtype), share_R / share_R.sum(), sparsity, mask)

    def beta(self) -> Tensor:
        """Coefficients on the simplex (R, D)."""
        return self.logits_RD.softmax(dim=-1)

    def alpha(self, beta_RD: Tensor) -> Tensor:
        """Expected pruning rate of each group (R,), eq. 3."""
        return beta_RD @ self.rates_D.float()

    def sparsity_term(self, alpha_R: Tensor) -> Tensor:
        """The second term of eq. 1 (scalar): squared relative distance of the expected sparsity from the target."""
        return ((alpha_R @ self.share_R - self.sparsity) / self.sparsity) ** 2

    @torch.no_grad()
    def counts(self, beta_RD: Tensor, alpha_R: Tensor) -> Tensor:
        """How many of the lowest ranks of a row are pruned (R,), int64, by the mask rule.

        By the count rule, the masks meet the sparsity at every step. One shift of all rates makes up for what alpha
        misses, as the exact budget does at the end. The loss is therefore always that of the target sparsity. No
        gradient flows through the shift.

        The probability of eq. 4 never rises with rank, so eq. 5 also prunes the lowest ranks of a row: those of the
        largest candidate d whose tail probability Σ_{e≥d} beta_e still reaches alpha.
        """
        if self.mask == "count":
            return kernels.pruned_ranks(alpha_R, self.width_R, self.share_R, self.sparsity)
        tail_RD = beta_RD.flip(-1).cumsum(-1).flip(-1)
        reaching_R = (tail_RD >= alpha_R[:, None]).sum(dim=-1) - 1  # tails fall with d, so the last one that reaches
        return candidate_ranks(self.rates_D[reaching_R.clamp_min_(0)], self.width_R)
