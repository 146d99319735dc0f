"""What besa asks of every reconstruction."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from besa.observing.input_statistics import InputStatistics
from besa.settings import Settings


class Rebuilder(Settings):
    """Base of all reconstructions; by default one that moves the kept weights of a mask it is given.

    Attributes:
        needs_gram: whether `rebuild` needs the Gram matrix of the linear's inputs.
        moves_weights: whether kept weights change.
        solver_bytes: bytes that `rebuild` needs per weight of a linear, without its matrices of (I, I).
    """

    needs_gram: ClassVar[bool] = True
    moves_weights: ClassVar[bool] = True
    solver_bytes: ClassVar[int]

    @property
    def keeps_mask(self) -> bool:
        """Whether the zeros are the lowest ranks of each row, as the allocation gave them."""
        return True

    @abstractmethod
    def rebuild(
        self,
        w_OI: Tensor,
        ranks_OI: Tensor,
        counts_O: Tensor,
        statistics: InputStatistics,
        group: int | None = None,
    ) -> Tensor:
        """The pruned weight (O, I) in the dtype of `w_OI`.

        Args:
            w_OI: the dense weight.
            ranks_OI: places in the pruning order of each row, 0 = first.
            counts_O: zeros that each row is to have.
            statistics: of the linear's input.
            group: consecutive columns of which every group keeps as many, None where there is no such pattern.
        """
