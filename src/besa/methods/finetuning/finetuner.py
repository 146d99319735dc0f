"""The base of all ways to fine-tune."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

from besa.methods.finetuning.problem import Finetuned, FinetuningProblem
from besa.settings import Settings


class Finetuner(Settings):
    """Base of all ways to fine-tune. The defaults describe one that does nothing.

    Attributes:
        moves_weights: whether kept weights change; the dense path then needs the outputs of all tokens.
    """

    moves_weights: ClassVar[bool] = False

    def with_epochs(self, epochs: int) -> Self:
        """The same with so many epochs."""
        return self

    @property
    def epoch_passes(self) -> float:
        """Forward passes over the calibration set in an epoch; a backward pass counts as two."""
        return 0.0

    @property
    def passes(self) -> float:
        """Forward passes over the calibration set in all epochs, at most."""
        return 0.0

    @property
    def learned_passes(self) -> float:
        """The part of `passes` that learning steps take."""
        return 0.0

    @property
    def sequences(self) -> int:
        """Sequences of a learning step."""
        return 1

    def summed_bytes(self, shapes: Sequence[tuple[int, int]], samples: int) -> int:
        """Bytes that ranks add up in all learning steps, at most.

        Args:
            shapes: rows and columns of each linear.
            samples: calibration sequences of all ranks.
        """
        return 0

    def bytes_per_weight(self, item: int) -> int:
        """Bytes that fine-tuning keeps for each weight, besides the weight itself.

        Args:
            item: bytes of a weight of the model.
        """
        return 0

    @abstractmethod
    def tune(self, problem: FinetuningProblem) -> Finetuned:
        """Fine-tune a pruned block. The block itself is not changed."""
