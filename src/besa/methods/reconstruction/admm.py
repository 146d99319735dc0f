"""ADMM: solve for the mask and the kept weights in turn (ALPS; Meng et al., 2024).

Shape suffixes: O rows (output channels), R rows of this rank, I columns (input channels).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from besa.counting.masks import hard_mask, rank
from besa.methods.reconstruction.rebuilder import Rebuilder
from besa.methods.reconstruction.ridge import best_ridge, better, solve, with_ridge
from besa.methods.reconstruction.written import written
from besa.observing.input_statistics import InputStatistics
from besa.system import ranks


class ADMM(Rebuilder):
    """Alternating directions: a penalty draws weights without a mask and weights with one together, more each round.

    Each row keeps its number of zeros but chooses a new mask. Columns are scaled so that the Hessian's diagonal is 1.
    The mask keeps the largest scaled weights. Conjugate gradient solves for the kept weights of the last mask. The
    Hessian has the ridge that held-out tokens ask for on the first mask (`ridge`).
    """

    method: Literal["admm"] = "admm"
    rounds: int = Field(default=30, ge=1, description="rounds of solving for the weights and then for the mask")
    penalty: float = Field(default=0.1, gt=0, description="penalty of the first round, as a share of H's diagonal")
    growth: float = Field(default=1.1, ge=1, description="factor of the penalty from round to round")
    iterations: int = Field(default=10, ge=1, description="steps of conjugate gradient on the last mask")
    solver_bytes: ClassVar[int] = 44

    @property
    def keeps_mask(self) -> bool:
        """No: each row chooses a new mask."""
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
        unsolved_OI = w_OI.where(hard_mask(ranks_OI, counts_O), 0)
        ridge = best_ridge(w_OI, hard_mask(ranks_OI, counts_O), statistics)
        hessian_II = with_ridge(statistics, ridge)
        scale_I = hessian_II.diagonal().sqrt()
        scaled_II = hessian_II / scale_I / scale_I[:, None]
        eigen = torch.linalg.eigh(scaled_II)

        def rebuilt(rows: slice) -> Tensor:
            w_RI = w_OI[rows]
            kept_RI = self._mask(w_RI, ranks_OI[rows], counts_O[rows], scaled_II, eigen, scale_I, group)
            return written(solve(w_RI, kept_RI, hessian_II, self.iterations), kept_RI, w_OI.dtype)

        return better(ranks.by_rows(rebuilt, len(w_OI)), unsolved_OI, w_OI, statistics)

    def _mask(
        self,
        w_OI: Tensor,
        ranks_OI: Tensor,
        counts_O: Tensor,
        hessian_II: Tensor,
        eigen: tuple[Tensor, Tensor],
        scale_I: Tensor,
        group: int | None,
    ) -> Tensor:
        """The mask (O, I) of the last round, boolean, True = kept.

        Args:
            w_OI: weight, of any rows.
            ranks_OI: these and the counts give the first mask.
            counts_O: zeros of each row.
            hessian_II: of scaled columns.
            eigen: its eigenvalues (I,) and its eigenvectors (I, I).
            scale_I: of the columns.
            group: as in `rebuild`.
        """
        values_I, vectors_II = eigen
        dense_OI = w_OI.float() * scale_I
        linear_OI = dense_OI @ hessian_II
        kept_OI = hard_mask(ranks_OI, counts_O)
        masked_OI = dense_OI.where(kept_OI, 0)
        dual_OI = torch.zeros_like(dense_OI)
        penalty = self.penalty
        for _ in range(self.rounds):
            right_OI = linear_OI + penalty * masked_OI - dual_OI
            free_OI = (right_OI @ vectors_II).div_(values_I + penalty) @ vectors_II.T
            pulled_OI = free_OI + dual_OI / penalty
            kept_OI = hard_mask(rank(pulled_OI.abs(), w_OI, group), counts_O)
            masked_OI = pulled_OI.where(kept_OI, 0)
            dual_OI += penalty * (free_OI - masked_OI)
            penalty *= self.growth
        return kept_OI
