"""No reconstruction: kept weights stay as they are."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from besa.counting.masks import hard_mask
from besa.methods.reconstruction.rebuilder import Rebuilder
from besa.observing.input_statistics import InputStatistics


class NoReconstruction(Rebuilder):
    """Prune the lowest ranks of each row and leave the other weights unchanged."""

    method: Literal["none"] = "none"
    needs_gram: ClassVar[bool] = False
    moves_weights: ClassVar[bool] = False
    solver_bytes: ClassVar[int] = 0

    def gathered_bytes(self, columns: int, item: int, group: int | None) -> int:
        """None: every rank has the weight."""
        return 0

    def rebuild(
        self,
        w_OI: Tensor,
        ranks_OI: Tensor,
        counts_O: Tensor,
        statistics: InputStatistics,
        group: int | None = None,
    ) -> Tensor:
        """The weight (O, I) with the `counts_O` lowest ranks of each row set to zero."""
        return w_OI.where(hard_mask(ranks_OI, counts_O), 0)
