"""The interface of importances: their capabilities and `score`."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from besa.observing.input_statistics import InputStatistics
from besa.settings import Settings


class Criterion(Settings):
    """Base of all importances.

    Attributes:
        needs_gram: whether `score` needs the Gram matrix of the linear's inputs.
        needs_inputs: whether `score` needs any statistics of the linear's input.
        power: importance to this power is the squared error at the linear's output when this one weight is removed.
            None if importance does not measure that error but only orders the weights of a linear. A recipe then
            refuses allocations that compare errors.
    """

    needs_gram: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = True
    power: ClassVar[int | None] = None

    @property
    def every(self) -> int:
        """One sequence in how many `score` takes its statistics from, if the recipe needs no Gram matrix."""
        return 1

    @abstractmethod
    def score(self, w_OI: Tensor, statistics: InputStatistics) -> Tensor:
        """The importance of each weight (O, I), float32, not negative; the lowest are pruned first.

        Args:
            w_OI: the weight, in the dtype of the model.
            statistics: of the linear's input; of no tokens if the linear is in an expert that was never chosen.
        """
