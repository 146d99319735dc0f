"""Conjugate gradient: the kept weights of a fixed mask move to where the linear's output is closest to the dense one.

Shape suffixes: O rows (output channels), I columns (input channels).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from besa.masks import hard_mask
from besa.reconstruction.written import written
from besa.settings import Settings
from besa.statistics import InputStatistics


class ConjugateGradient(Settings):
    """Preconditioned conjugate gradient on the least squares that a mask leaves (the end of ALPS; Meng et al., 2024).

    Minimises ‖W X − T‖² over the kept weights, with X the linear's inputs on the pruned path. T is the dense weight's
    output for X itself, or, with `target: dense`, for the dense path's inputs. Damping pulls towards the dense weight.
    """

    method: Literal["cg"] = "cg"
    iterations: int = Field(default=20, ge=1, description="steps, each a product with the Hessian")
    damping: float = Field(default=0.01, gt=0, description="added to the Hessian's diagonal, as a share of its mean")
    target: Literal["dense", "pruned"] = Field(
        default="pruned", description="inputs of the dense weight: the dense path's or the pruned path's"
    )
    needs_gram: ClassVar[bool] = True

    @property
    def needs_cross(self) -> bool:
        """Whether the dense path's inputs are to be seen beside the pruned path's."""
        return self.target == "dense"

    def rebuild(
        self,
        w_OI: Tensor,
        ranks_OI: Tensor,
        counts_O: Tensor,
        statistics: InputStatistics,
        group: int | None = None,
    ) -> Tensor:
        """The weight (O, I) in its dtype, the `counts_O` lowest ranks of each row zero, the others moved."""
        kept_OI = hard_mask(ranks_OI, counts_O)
        hessian_II, wanted_OI = normal_equations(w_OI.float(), statistics, self.damping)
        rebuilt_OI = solve(w_OI.float().where(kept_OI, 0), kept_OI, hessian_II, wanted_OI, self.iterations)
        return written(rebuilt_OI, kept_OI, w_OI.dtype)


def normal_equations(w_OI: Tensor, statistics: InputStatistics, damping: float) -> tuple[Tensor, Tensor]:
    """H (I, I) and B (O, I) of the problem min ½ W H Wᵀ − B Wᵀ: Σ x xᵀ and W Σ d xᵀ, damped towards the dense W.

    d is the dense path's input where the statistics saw it, else x.
    """
    assert statistics.gram_II is not None, "the recipe did not ask for the Gram matrix"
    hessian_II = statistics.hessian(damping)
    if statistics.cross_II is None:
        return hessian_II, w_OI @ hessian_II
    return hessian_II, w_OI @ (statistics.cross_II - statistics.gram_II + hessian_II)


def solve(w_OI: Tensor, free_OI: Tensor, hessian_II: Tensor, wanted_OI: Tensor, iterations: int) -> Tensor:
    """Lower ½ W H Wᵀ − B Wᵀ of each row by its free weights, all rows at once; the others stay as they are.

    Every row has a step length and a direction of its own; the preconditioner is H's diagonal.

    Args:
        w_OI: where to start, float32.
        free_OI: True where a weight may move.
        hessian_II: H, positive definite.
        wanted_OI: B.
        iterations: steps.
    """
    scale_I = 1 / hessian_II.diagonal()
    w_OI = w_OI.clone()
    residual_OI = (wanted_OI - w_OI @ hessian_II).masked_fill_(~free_OI, 0)
    direction_OI = residual_OI * scale_I
    descent_O = (residual_OI * direction_OI).sum(dim=1)
    for _ in range(iterations):
        product_OI = (direction_OI @ hessian_II).masked_fill_(~free_OI, 0)
        curvature_O = (direction_OI * product_OI).sum(dim=1)
        step_O = torch.where(curvature_O > 0, descent_O / curvature_O, 0)  # 0: the row is solved
        w_OI.addcmul_(step_O[:, None], direction_OI)
        residual_OI.addcmul_(-step_O[:, None], product_OI)
        scaled_OI = residual_OI * scale_I
        before_O, descent_O = descent_O, (residual_OI * scaled_OI).sum(dim=1)
        turn_O = torch.where(before_O > 0, descent_O / before_O, 0)
        direction_OI = scaled_OI.addcmul_(turn_O[:, None], direction_OI)
    return w_OI
