"""ADMM: solve for the mask and the kept weights in turn (ALPS; Meng et al., 2024, arXiv 2406.07831).

Shape suffixes: O rows (output channels), R rows of this rank, I columns (input channels).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import linear

from besa.counting.masks import hard_mask, largest
from besa.counting.precision import products_in
from besa.methods.reconstruction.rebuilder import Rebuilder
from besa.methods.reconstruction.ridge import best_ridge, better, solve, with_ridge
from besa.methods.reconstruction.written import written
from besa.observing.input_statistics import InputStatistics
from besa.system import ranks


class ADMM(Rebuilder):
    """Alternating directions: a penalty draws weights without a mask and weights with one together, more and more.

    Each row keeps its number of zeros but chooses a new mask. Columns are scaled so that the Hessian's diagonal is 1,
    and the mask keeps the largest scaled weights. Conjugate gradient goes on from the last weights, on the last mask.
    The Hessian has the ridge that held-out tokens ask for on the first mask (`ridge`).

    ALPS raises its penalty in small steps: 30 rounds from 0.1, times 1.33 after every third, come near it. The defaults
    have most of that gain for a third of its products (docs/log.md).
    """

    method: Literal["admm"] = "admm"
    rounds: int = Field(default=8, ge=1, description="rounds of solving for the weights and then for the mask")
    penalty: float = Field(default=0.4, gt=0, description="penalty of the first rounds, as a share of H's diagonal")
    growth: float = Field(default=2.0, ge=1, description="factor by which the penalty rises")
    hold: int = Field(default=4, ge=1, description="rounds with the same penalty: each penalty takes an inverse of H")
    iterations: int = Field(default=4, ge=1, description="steps of conjugate gradient on the last mask")
    solver_bytes: ClassVar[int] = 44

    @property
    def keeps_mask(self) -> bool:
        """False: each row chooses a new mask."""
        return False

    def rebuild(
        self,
        w_OI: Tensor,
        ranks_OI: Tensor,
        counts_O: Tensor,
        statistics: InputStatistics,
        group: int | None = None,
    ) -> Tensor:
        """The weight (O, I) in its dtype with `counts_O` zeros in each row; `ranks_OI` give the first mask.

        On held-out tokens it is never worse than the unchanged weights under the first mask.
        """
        first_OI = hard_mask(ranks_OI, counts_O)
        hessian_II = with_ridge(statistics, best_ridge(w_OI, first_OI, statistics))

        def rebuilt(rows: slice) -> Tensor:
            w_RI = w_OI[rows]
            alive_RI = w_RI.masked_fill(statistics.dead_I, 0)  # what does nothing goes first
            masked_RI, kept_RI = self._in_turn(alive_RI, first_OI[rows], counts_O[rows], hessian_II, group)
            return written(solve(w_RI, kept_RI, hessian_II, self.iterations, masked_RI), kept_RI, w_OI.dtype)

        return better(ranks.by_rows(rebuilt, len(w_OI)), w_OI.where(first_OI, 0), w_OI, statistics)

    def _in_turn(
        self, w_OI: Tensor, first_OI: Tensor, counts_O: Tensor, hessian_II: Tensor, group: int | None
    ) -> tuple[Tensor, Tensor]:
        """The weights (O, I) and the mask of the last round, True = kept; the other weights are zero.

        Args:
            w_OI: the dense weight, of any rows.
            first_OI: the first mask.
            counts_O: zeros of each row.
            hessian_II: of the inputs.
            group: as in `rebuild`.
        """
        scale_I = hessian_II.diagonal().sqrt()
        scaled_II = hessian_II / scale_I / scale_I[:, None]
        ones_I, pull_II = scaled_II.diagonal().clone(), torch.empty_like(scaled_II)
        dense_OI, penalty = w_OI.float() * scale_I, self.penalty
        masked_OI, dual_OI = dense_OI.where(first_OI, 0), torch.zeros_like(dense_OI)
        for done in range(self.rounds):
            if done % self.hold == 0:
                if done:
                    penalty, dual_OI = penalty * self.growth, dual_OI / self.growth
                scaled_II.diagonal().copy_(ones_I + penalty)  # positive definite: no look at whether Cholesky failed
                torch.cholesky_inverse(torch.linalg.cholesky_ex(scaled_II).L, out=pull_II).mul_(penalty)
            with products_in(w_OI.dtype):
                free_OI = dense_OI + linear(masked_OI - dense_OI - dual_OI, pull_II)
            pulled_OI = free_OI + dual_OI
            kept_OI = largest(pulled_OI.abs(), w_OI, counts_O, group)
            masked_OI, dual_OI = pulled_OI.where(kept_OI, 0), pulled_OI.masked_fill(kept_OI, 0)
        return masked_OI / scale_I, kept_OI
