"""Conjugate gradient: the kept weights of a fixed mask that bring the linear's output closest to the dense output.

Shape suffixes: O rows (output channels), I columns (input channels).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from besa.counting.masks import hard_mask
from besa.methods.reconstruction.rebuilder import Rebuilder
from besa.methods.reconstruction.written import written
from besa.observing.input_statistics import InputStatistics
from besa.system import ranks


class ConjugateGradient(Rebuilder):
    """Preconditioned conjugate gradient for least squares on a fixed mask (last step of ALPS; Meng et al., 2024).

    Minimises ‖W X − W̄ X‖² over the kept weights of W. X are the linear's inputs on the pruned path, W̄ is the dense
    weight. Damping pulls W towards W̄.
    """

    method: Literal["cg"] = "cg"
    iterations: int = Field(default=20, ge=1, description="steps, each a product with the Hessian")
    damping: float = Field(default=0.01, gt=0, description="added to the Hessian's diagonal, as a share of its mean")
    solver_bytes: ClassVar[int] = 32

    def rebuild(
        self,
        w_OI: Tensor,
        ranks_OI: Tensor,
        counts_O: Tensor,
        statistics: InputStatistics,
        group: int | None = None,
    ) -> Tensor:
        """The weight (O, I) in its dtype; the `counts_O` lowest ranks of each row are zero, the others are changed."""
        hessian_II = statistics.hessian(self.damping)

        def rebuilt(rows: slice) -> Tensor:
            kept_OI = hard_mask(ranks_OI[rows], counts_O[rows])
            return written(solve(w_OI[rows].float(), kept_OI, hessian_II, self.iterations), kept_OI, w_OI.dtype)

        return ranks.by_rows(rebuilt, len(w_OI))


def solve(dense_OI: Tensor, kept_OI: Tensor, hessian_II: Tensor, iterations: int) -> Tensor:
    """Minimise (W − W̄) H (W − W̄)ᵀ of each row over its kept weights; returns W (O, I), the other weights zero.

    All rows are solved at once, each with its own direction and step length. The preconditioner is H's diagonal.

    Args:
        dense_OI: W̄, float32; W starts from its kept weights.
        kept_OI: True where a weight is kept.
        hessian_II: H, positive definite.
        iterations: steps.
    """
    scale_I, pruned_OI = 1 / hessian_II.diagonal(), ~kept_OI
    w_OI = dense_OI.where(kept_OI, 0)
    residual_OI = (dense_OI @ hessian_II - w_OI @ hessian_II).masked_fill_(pruned_OI, 0)
    direction_OI = residual_OI * scale_I
    descent_O = (residual_OI * direction_OI).sum(dim=1)
    for _ in range(iterations):
        product_OI = (direction_OI @ hessian_II).masked_fill_(pruned_OI, 0)
        curvature_O = (direction_OI * product_OI).sum(dim=1)
        step_O = torch.where(curvature_O > 0, descent_O / curvature_O, 0)  # 0: the row is solved
        w_OI.addcmul_(step_O[:, None], direction_OI)
        residual_OI.addcmul_(-step_O[:, None], product_OI)
        scaled_OI = residual_OI * scale_I
        before_O, descent_O = descent_O, (residual_OI * scaled_OI).sum(dim=1)
        turn_O = torch.where(before_O > 0, descent_O / before_O, 0)
        direction_OI = scaled_OI.addcmul_(turn_O[:, None], direction_OI)
    return w_OI
