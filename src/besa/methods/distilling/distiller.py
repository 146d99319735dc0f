"""The base of all ways to distil, what a model learns from, and what comes of it.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from besa.methods.distilling.study import Study
from besa.models.activations import HiddenStates
from besa.models.whole import Whole
from besa.progress import Progress
from besa.quantization import Grid
from besa.settings import Settings
from besa.system.ranks import Share


@dataclass(frozen=True)
class Pupil:
    """A pruned model that learns, and what it learns from.

    Attributes:
        whole: the pruned model.
        linears: full names of the pruned linears, whose kept weights may change.
        tokens_NT: of the sequences of this rank.
        inputs_NTC: of the first block, for the same sequences.
        targets_NTC: outputs of the last block of the dense model.
        study: all sequences, of this rank and others.
        share: those of this rank.
        seed: of the order of sequences.
        seconds: that the run has taken so far.
        head: cost of the model's head, as a share of a forward pass through all blocks.
        grids: by full name, of linears that the model has unrounded and that predict as rounded.
    """

    whole: Whole
    linears: list[str]
    tokens_NT: Tensor
    inputs_NTC: HiddenStates
    targets_NTC: HiddenStates
    study: Study
    share: Share
    seed: int
    seconds: float
    head: float
    grids: Mapping[str, Grid] = field(default_factory=dict)


@dataclass(frozen=True)
class Distilled:
    """The result of distilling.

    Attributes:
        epochs: that the step sizes were laid out for; those of each stage.
        losses: on held-out sequences, before the first epoch and after every epoch.
        helped: whether the model has changed.
        changed: full names of the norms and biases that have changed.
    """

    epochs: int = 0
    losses: list[float] = field(default_factory=list)
    helped: bool = False
    changed: list[str] = field(default_factory=list)


class Snapshots(Protocol):
    """Where the states of the work are kept, so that a killed run goes on from the last."""

    @property
    def position(self) -> dict[str, Any] | None:
        """Position of the last state, in JSON types; None if there is none."""

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Tensors of a group in the last state."""

    def keep(
        self, position: Mapping[str, Any], groups: Iterable[tuple[str, Mapping[str, Tensor]]], urgent: bool
    ) -> None:
        """Keep a state, if it is urgent or some time has passed since the last one.

        Args:
            position: in the work, in JSON types.
            groups: tensors by name of each group; one group at a time is in memory.
            urgent: keep it now.
        """


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

    def studied(self, samples: int) -> int:
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
    def distill(self, pupil: Pupil, snapshots: Snapshots, progress: Progress) -> Distilled:
        """Change the model in place, if that brings its predictions closer to those of the dense model.

        Args:
            pupil: the model.
            snapshots: where states are kept.
            progress: is called with (steps done, steps, state) after every step.
        """


class NoDistilling(Distiller):
    """The model stays as its blocks were pruned; `distill.method=none`."""

    method: Literal["none"] = "none"

    def distill(self, pupil: Pupil, snapshots: Snapshots, progress: Progress) -> Distilled:
        """Change nothing, and return no losses."""
        return Distilled()
