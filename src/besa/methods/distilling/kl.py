"""Distilling what is not pruned: its predictions come closer to those of the dense model, and to the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self, TypeVar

from pydantic import Field

from besa.learning import Learning
from besa.methods.distilling.distiller import Distiller
from besa.methods.distilling.snapshots import Snapshots
from besa.methods.distilling.student import Distilled, Student
from besa.methods.distilling.trainer import Trainer
from besa.methods.distilling.training_set import needed
from besa.methods.steps import split
from besa.observing.input_statistics import HELD_OUT
from besa.progress import Progress

LEARNING, LEARNING_HEADS = 4, 3  # passes through blocks and head to learn: the blocks run again for the backward pass
HEADS = 2  # passes through the head to measure: of the dense model too

T = TypeVar("T")


class MaskedKL(Learning, Distiller):
    """Adam on what is not pruned, down KL(dense ‖ pruned) + `cross_entropy` · −log pruned(token that follows).

    Soft and hard targets, as of Hinton, Vinyals and Dean (2015, arXiv:1503.02531), at temperature 1, in nats.

    The step size grows over the first steps and then falls linearly to zero. The loss on held-out sequences is measured
    after every epoch. The best values are kept. An epoch that does not lower the loss is taken back, and steps become
    smaller, as models differ in what they bear. Two such epochs in a row are the last.
    """

    method: Literal["kl"] = "kl"
    learns: Literal["weights", "norms", "both", "together"] = Field(
        default="weights",
        description="kept weights of pruned linears; norms and biases; both, first norms; or both at once",
    )
    epochs: int = Field(default=2, ge=1, description="passes over the calibration set, at most; of both, for each")
    further: bool = Field(
        default=False,
        description="learn from further sequences of the calibration's texts, new ones in every epoch, as far as there "
        "are any; else from the calibration set",
    )
    minutes: float | None = Field(
        default=None,
        gt=0,
        description="in place of epochs: as many as fit into so many minutes of the whole run; the record has their "
        "number",
    )
    rate: float = Field(
        default=1e-3,
        gt=0,
        description="largest step size, as a share of a tensor's root mean square; times √batch, for fewer steps",
    )
    cross_entropy: float = Field(
        default=0.0,
        ge=0,
        description="factor of the cross-entropy of the text's own tokens, beside the divergence from the dense "
        "model's predictions",
    )
    autocast: bool = Field(
        default=True, description="multiply in bfloat16 while learning, if that makes a float32 run faster"
    )
    moves_weights: ClassVar[bool] = True
    most_shared: ClassVar[int] = 4

    @property
    def time_budget(self) -> float | None:
        """The setting `minutes`."""
        return self.minutes

    def with_epochs(self, epochs: int) -> Self:
        """The same settings with so many epochs, and no minutes that decide their number."""
        return self.model_copy(update={"epochs": epochs, "minutes": None})

    def within(self, minutes: float) -> Self:
        """The same settings with so many minutes."""
        return self.model_copy(update={"minutes": minutes})

    def training_sequences(self, samples: int) -> int:
        """Sequences for all epochs plus the held-out ones."""
        return needed(samples, self.epochs if self.further else 1)

    def epoch_passes(self, head: float) -> float:
        """Forward twice and backward over the sequences learned from, and forward over those held out.

        With each goes the head, once for the dense model too.
        """
        learning = (LEARNING + LEARNING_HEADS * head) * (1 - 1 / HELD_OUT)
        return len(self.stages([0], [0])) * (learning + self.measuring_passes(head))

    def passes(self, head: float, epochs: int | None = None, own: int | None = None) -> float:
        """All epochs, the held-out sequences once before the first, and all sequences through the dense model."""
        share = self.epochs if epochs is None else epochs / len(self.stages([0], [0]))
        if own is None:
            own = self.epochs if self.further else 1
        dense = 1 / HELD_OUT + own * (1 - 1 / HELD_OUT)
        return share * self.epoch_passes(head) + self.measuring_passes(head) + dense

    def measuring_passes(self, head: float) -> float:
        """Forward over the held-out sequences."""
        return (1 + HEADS * head) / HELD_OUT

    def learned_passes(self, head: float) -> float:
        """Forward and backward over the sequences learned from, in all epochs."""
        epochs = self.epochs * len(self.stages([0], [0]))
        return epochs * (LEARNING + LEARNING_HEADS * head) * (1 - 1 / HELD_OUT)

    def learning_bytes(self, kept: int, vectors: int) -> int:
        """Value, gradient and two moments in float32, of what learns at once."""
        return 16 * max(map(sum, self.stages([kept], [vectors])))

    def state_bytes(self, kept: int, vectors: int, item: int) -> int:
        """Value and two moments in float32 of what learns at once, and the best value of all."""
        stages = [sum(stage) for stage in self.stages([kept], [vectors])]
        return 12 * max(stages) + item * sum(stages)

    def summed_bytes(self, kept: int, linears: int, vectors: Sequence[int], samples: int) -> int:
        """Float32 gradients, and for each tensor whether any token of the step reached it."""
        of_a_step = self.stages([4 * kept + 8 * linears], [4 * sum(vectors) + 8 * len(vectors)])
        return self.epochs * self.steps(samples) * sum(map(sum, of_a_step))

    def distill(self, student: Student, snapshots: Snapshots, progress: Progress) -> Distilled:
        """The values with the lowest loss on the held-out sequences."""
        return Trainer(self, student, snapshots, progress).run()

    def stages(self, linears: Sequence[T], vectors: Sequence[T]) -> list[list[T]]:
        """What learns at once, stage by stage.

        Args:
            linears: one thing for each pruned linear, such as its name.
            vectors: the same for each norm and bias.
        """
        chosen: dict[str, list[Sequence[T]]] = {
            "weights": [linears],
            "norms": [vectors],
            "both": [vectors, linears],
            "together": [[*linears, *vectors]],
        }
        return [list(stage) for stage in chosen[self.learns] if stage]

    def steps(self, samples: int) -> int:
        """Learning steps in an epoch."""
        _, learned = split(samples)
        return -(-len(learned) // self.sequences)
