"""What besa asks of every importance."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from besa.settings import Settings
from besa.statistics import InputStatistics


class Criterion(Settings):
    """Base of all importances.

    Attributes:
        needs_gram: `score` looks at the Gram matrix of the linear's inputs, which is then summed up.
        power: importance to this power is the squared error that the loss of a weight makes at its linear's output.
            None where it is no such error and only orders the weights of a linear: what compares errors refuses it.
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
