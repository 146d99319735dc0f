"""Conjugate gradient: the kept weights of a fixed mask that bring the linear's output closest to the dense output.

Source: ALPS (Meng et al., 2024, arXiv 2406.07831), of which this is the last step.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from besa.counting.masks import hard_mask
from besa.methods.reconstruction.rebuilder import Rebuilder
from besa.methods.reconstruction.ridge import best_ridge, better, solve, with_ridge
from besa.methods.reconstruction.written import written
from besa.observing.input_statistics import InputStatistics
from besa.system import ranks


class ConjugateGradient(Rebuilder):
    """Preconditioned conjugate gradient for least squares on a fixed mask (last step of ALPS; Meng et al., 2024).

    Minimises ‖W X − W̄ X‖² over the kept weights of W. X are the linear's inputs on the pruned path, W̄ is the dense
    weight. A ridge pulls W towards W̄, as strongly as held-out tokens ask for (`ridge`). Weights that solving does not
    help on these stay as they are.
    """

    method: Literal["cg"] = "cg"
    iterations: int = Field(default=8, ge=1, description="steps, each a product with the Hessian")
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
        kept_OI = hard_mask(ranks_OI, counts_O)
        hessian_II = with_ridge(statistics, best_ridge(w_OI, kept_OI, statistics))

        def rebuilt(rows: slice) -> Tensor:
            solved_OI = solve(w_OI[rows], kept_OI[rows], hessian_II, self.iterations)
            return written(solved_OI, kept_OI[rows], w_OI.dtype)

        return better(ranks.by_rows(rebuilt, len(w_OI)), w_OI.where(kept_OI, 0), w_OI, statistics)
