"""Weights that change at every learning step (masked, quantised or both), and the gradients of their rates.

Shape suffixes: O rows, I columns, D candidate pruning rates, R rate groups (rows, or linears whose rows share a rate).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from besa import kernels
from besa.counting.precision import widest
from besa.methods.allocation.problem import RankedLinear
from besa.methods.allocation.rates import Rates, candidate_bins
from besa.quantization import Clipping


class ChangingLinears:
    """Linears of one budget that learn together, straight through hard masks (eqs. 4 to 6) and rounding (eq. 7).

    The weights are leaves of the block's computation. As soon as a leaf has its gradient, the gradient is summed up and
    dropped. Memory never holds the gradients of two weights at once.

    A step sends gradients back to the weights for each of its sequences; `gradients` are those of the last of them.

    Args:
        linears: by full name.
        rates: of the rows or of the linears; None if nothing is pruned.
        clippings: of the quantised linears, by full name.
        dtype: of the weights that the block runs with.

    Attributes:
        rates: the pruning rates that are learned.
        weights: Q(W) ⊙ M (O, I) by full name, as the last `update` wrote them.
    """

    def __init__(
        self,
        linears: Mapping[str, RankedLinear],
        rates: Rates | None,
        clippings: Mapping[str, Clipping],
        dtype: torch.dtype,
    ) -> None:
        self.rates = rates
        self.weights: dict[str, Tensor] = {}
        self._parts: list[_ChangingLinear] = []
        for name, linear in linears.items():
            part = _ChangingLinear(linear, rates, clippings.get(name), dtype)
            self.weights[name] = torch.empty_like(part.w_OI).requires_grad_()
            self.weights[name].register_post_accumulate_grad_hook(part.sum_up)
            self._parts.append(part)

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters to learn: the logits of beta and those of gamma."""
        clippings = [part.clipping.logits_2OG for part in self._parts if part.clipping is not None]
        return [*([self.rates.logits_RD] if self.rates else []), *clippings]

    def update(self) -> None:
        """Compute the weights from the present parameters."""
        counts_R = None
        if self.rates is not None:
            self._beta_RD = self.rates.beta()
            self._alpha_R = self.rates.alpha(self._beta_RD)
            counts_R = self.rates.counts(self._beta_RD, self._alpha_R)
        with torch.no_grad():
            for part, leaf_OI, counts_O in zip(self._parts, self.weights.values(), self._by_row(counts_R), strict=True):
                part.update(leaf_OI, counts_O)

    @property
    def gradients(self) -> list[Tensor]:
        """What the last backward pass left: dL/dM by row and first candidate (O, D), and gradients of gamma's logits.

        Whoever adds up several passes writes the sums here, before `backward`.
        """
        sums = [part.sums_OD for part in self._parts if self.rates is not None]
        return [*sums, *(part.clipping_gradient for part in self._parts if part.clipping_gradient is not None)]

    def finish_pass(self) -> None:
        """Zero the `gradients` of weights that the last backward pass did not reach: experts that no token came to."""
        for part in self._parts:
            part.finish_pass()

    def backward(self, factor: Tensor, penalty: Tensor) -> None:
        """Compute the gradients of the parameters from `gradients`.

        Args:
            factor: by which the gradients of the first term of eq. 1 are multiplied (scalar).
            penalty: weight of the second term of eq. 1.
        """
        if self.rates is not None:
            sparsity_term = self.rates.sparsity_term(self._alpha_R)
            torch.autograd.backward([self._beta_RD, sparsity_term], [self._beta_gradient(factor), penalty])
        for part in self._parts:
            if part.clipping is not None and part.clipping_gradient is not None:
                part.clipping.logits_2OG.grad = part.clipping_gradient * factor

    def _beta_gradient(self, factor: Tensor) -> Tensor:
        """dL/dbeta (R, D) × the factor: −Σ_j dL/dM_j · [candidate d prunes rank j]."""
        sums = [part.sums_OD for part in self._parts]
        if not self._per_row:
            sums = [sums_OD.sum(dim=0, keepdim=True) for sums_OD in sums]
        return torch.cat(sums).cumsum(dim=1).mul_(-factor)

    def row_rates(self) -> dict[str, Tensor]:
        """The learned rate of each row (O,) by full name."""
        assert self.rates is not None
        with torch.no_grad():
            alpha_R = self.rates.alpha(self.rates.beta())
            alpha_R = alpha_R.to(widest(alpha_R.device))
        return {name: part for name, part in zip(self.weights, self._by_row(alpha_R), strict=True) if part is not None}

    @property
    def _per_row(self) -> bool:
        return self.rates is not None and len(self.rates.width_R) > len(self._parts)

    def _by_row(self, x_R: Tensor | None) -> list[Tensor | None]:
        """Values of the rate groups (R,) as values of the rows (O,) of each linear."""
        rows = [len(part.w_OI) for part in self._parts]
        if x_R is None:
            return [None] * len(rows)
        if self._per_row:
            return list(x_R.split(rows))
        return [x.expand(n) for x, n in zip(x_R, rows, strict=True)]


class _ChangingLinear:
    """One changing linear without its leaf: a leaf that its own hook refers to would never be freed."""

    def __init__(
        self, linear: RankedLinear, rates: Rates | None, clipping: Clipping | None, dtype: torch.dtype
    ) -> None:
        self.w_OI = linear.w_OI.to(dtype).contiguous()
        if clipping is not None and self.w_OI is linear.w_OI:
            self.w_OI = torch.empty_like(self.w_OI)  # it will hold Q(W)
        self.clipping = clipping
        self._ranks_OI = linear.ranks_OI
        self._counts_O: Tensor | None = None
        self._reached = False  # by the present backward pass
        rows, columns = self.w_OI.shape
        candidates = len(rates.rates_D) if rates else 0
        self.sums_OD = torch.zeros(rows, candidates, device=self.w_OI.device)
        learned = clipping is not None and clipping.logits_2OG.requires_grad
        self.clipping_gradient = torch.zeros_like(clipping.logits_2OG) if clipping and learned else None
        self._bins_I = candidate_bins(rates.rates_D, columns) if rates else None

    def update(self, leaf_OI: Tensor, counts_O: Tensor | None) -> None:
        """Write the present weight to its leaf."""
        if self.clipping is not None:
            kernels.quantized(self.clipping, self.w_OI)
        self._counts_O = None if counts_O is None else counts_O.contiguous()
        if self._counts_O is None:
            leaf_OI.copy_(self.w_OI)
        else:
            kernels.masked(self.w_OI, self._ranks_OI, self._counts_O, leaf_OI)

    def sum_up(self, leaf_OI: Tensor) -> None:
        """Sum up the gradient of the leaf by candidates, and drop it."""
        assert leaf_OI.grad is not None
        gradient_OI, leaf_OI.grad = leaf_OI.grad.contiguous(), None
        self._reached = True
        if self._bins_I is not None:
            kernels.binned(gradient_OI, self.w_OI, self._ranks_OI, self._bins_I, self.sums_OD)
        if self.clipping is not None and self.clipping_gradient is not None:
            if self._counts_O is not None:
                kernels.masked(gradient_OI, self._ranks_OI, self._counts_O, gradient_OI)
            self.clipping_gradient = kernels.clipping_gradient(gradient_OI, self.clipping)

    def finish_pass(self) -> None:
        """Zero what an earlier pass has left, if this one did not reach the leaf."""
        if not self._reached:
            self.sums_OD.zero_()
            if self.clipping_gradient is not None:
                self.clipping_gradient.zero_()
        self._reached = False
