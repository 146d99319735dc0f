"""What besa asks of every importance."""

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
        power: importance to this power is the squared error at the linear's output when this one weight is removed.
            None if importance does not measure that error: it only orders the weights of a linear, and a recipe refuses
            allocations that compare errors.
    """

    needs_gram: ClassVar[bool] = False
    power: ClassVar[int | None] = None

    @abstractmethod
    def score(self, w_OI: Tensor, statistics: InputStatistics) -> Tensor:
        """How much each weight matters (O, I), float32, not negative; the lowest go first.

        Args:
            w_OI: the weight, in the dtype of the model.
            statistics: of the linear's input; no token may have reached it (an expert that was never chosen).
        """
