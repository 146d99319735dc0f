"""The interface of reconstructions: their capabilities and `rebuild`."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from besa.observing.input_statistics import InputStatistics
from besa.settings import Settings


class Rebuilder(Settings):
    """Base of all reconstructions. The defaults describe one that changes the kept weights of a given mask.

    Attributes:
        needs_gram: whether `rebuild` needs the Gram matrix of the linear's inputs.
        moves_weights: whether kept weights change.
        solver_bytes: bytes that `rebuild` needs for each weight of a linear, besides its matrices (I, I).
    """

    needs_gram: ClassVar[bool] = True
    moves_weights: ClassVar[bool] = True
    solver_bytes: ClassVar[int]

    @property
    def keeps_mask(self) -> bool:
        """Whether the zeros are the lowest ranks of each row, as the allocation chose them."""
        return True

    @property
    def own_importance(self) -> str | None:
        """The method of importance by which it chooses the zeros itself; None if the recipe's decides."""
        return None

    def gathered_bytes(self, columns: int, item: int, group: int | None) -> int:
        """Bytes that ranks gather of each row of a linear: by default the rebuilt row.

        Args:
            columns: of the linear.
            item: bytes of a weight of the model.
            group: as in `rebuild`.
        """
        return item * columns

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
            ranks_OI: place of each weight in the pruning order of its row, 0 = first.
            counts_O: zeros of each row.
            statistics: of the linear's input.
            group: columns in each group of an n:m pattern; None without such a pattern.
        """
