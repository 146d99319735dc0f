"""Optimal brain surgeon: the error of removing a weight when the other weights of the row may compensate.

Source: SparseGPT (Frantar & Alistarh, 2023, arXiv 2301.00774).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from besa.methods.importance.criterion import Criterion
from besa.observing.input_statistics import InputStatistics


class OBS(Criterion):
    """Importance w²/[H⁻¹]ⱼⱼ with H = X Xᵀ (Hassibi & Stork, 1992; the score of SparseGPT, Frantar & Alistarh, 2023).

    Weights of channels that are always zero count nothing, as in SparseGPT.
    """

    method: Literal["obs"] = "obs"
    damping: float = Field(default=0.01, gt=0, description="added to H's diagonal, as a share of its mean")
    needs_gram: ClassVar[bool] = True
    power: ClassVar[int | None] = 1

    def score(self, w_OI: Tensor, statistics: InputStatistics) -> Tensor:
        """Importance (O, I), float32, of the weight `w_OI`, from the Gram matrix (I, I) of its inputs.

        Raises:
            BesaError: the damped Gram matrix is not positive definite.
        """
        inverse_II = statistics.inverse_hessian(self.damping)
        return (w_OI.float().square() / inverse_II.diagonal()).masked_fill_(statistics.dead_I, 0)
