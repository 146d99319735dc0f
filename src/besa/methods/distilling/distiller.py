"""The base of all ways to distil."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

from besa.methods.distilling.snapshots import Snapshots
from besa.methods.distilling.student import Distilled, Student
from besa.progress import Progress
from besa.settings import Settings


class Distiller(Settings):
    """Base of all ways to distil. The defaults describe one that does nothing.

    Attributes:
        moves_weights: whether the model changes.
    """

    moves_weights: ClassVar[bool] = False

    @property
    def sequences(self) -> int:
        """Sequences of a learning step."""
        return 1

    @property
    def time_budget(self) -> float | None:
        """Minutes of the whole run that decide the number of epochs; None if the settings give the number."""
        return None

    def with_epochs(self, epochs: int) -> Self:
        """The same with so many epochs, in place of its own number or of a time budget."""
        return self

    def within(self, minutes: float) -> Self:
        """The same with a time budget of so many minutes."""
        return self

    def training_sequences(self, samples: int) -> int:
        """The number of sequences to learn from, if there are so many. That of the calibration set means that set.

        Args:
            samples: calibration sequences.
        """
        return 0

    def epoch_passes(self, head: float) -> float:
        """Forward passes over the calibration set in an epoch of all that learns.

        Args:
            head: cost of the model's head, as a share of a forward pass through all blocks.
        """
        return 0.0

    def passes(self, head: float, epochs: int | None = None, own: int | None = None) -> float:
        """Forward passes over as many sequences as the calibration set has, through the dense model too.

        Args:
            head: as of `epoch_passes`.
            epochs: of one part after the other; by default as many as there are at most.
            own: epochs that have sequences of their own; by default as many as ask for them.
        """
        return 0.0

    def learned_passes(self, head: float) -> float:
        """The part of `passes` that learning steps take."""
        return 0.0

    def learning_bytes(self, kept: int, vectors: int) -> int:
        """Bytes that learning keeps besides the model.

        Args:
            kept: number of weights of the pruned linears that are not pruned.
            vectors: number of elements of norms and biases.
        """
        return 0

    def state_bytes(self, kept: int, vectors: int, item: int) -> int:
        """Bytes of a state on the disk.

        Args:
            kept: as of `learning_bytes`.
            vectors: likewise.
            item: bytes of a weight of the model.
        """
        return 0

    def summed_bytes(self, kept: int, linears: int, vectors: Sequence[int], samples: int) -> int:
        """Bytes that ranks add up in all learning steps, at most.

        Args:
            kept: as of `learning_bytes`.
            linears: number of pruned linears.
            vectors: number of elements of each norm and bias.
            samples: calibration sequences of all ranks.
        """
        return 0

    @abstractmethod
    def distill(self, student: Student, snapshots: Snapshots, progress: Progress) -> Distilled:
        """Change the model in place, if that brings its predictions closer to those of the dense model.

        Args:
            student: the pruned model.
            snapshots: where states are kept.
            progress: is called with (steps done, steps, state) after every step.
        """
