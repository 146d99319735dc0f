"""What all stages of a run share: model, method, calibration data and resources."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from besa.data.calibration import Calibration
from besa.methods.distilling import TrainingSet
from besa.methods.recipe import Recipe
from besa.models.blocks import Block
from besa.models.streaming import Decoder
from besa.progress import Progress, silent
from besa.pruning.paths import PLAIN, Resources
from besa.storage.journal import Journal
from besa.system import ranks
from besa.system.ranks import Share


@dataclass(frozen=True)
class Run:
    """A run of a recipe.

    Attributes:
        decoder: causal decoder in evaluation mode.
        recipe: the method.
        calibration: token ids (N, T).
        training_set: what distilling learns from; None if nothing is distilled.
        dense: of the dense path, if the decoder has lost experts; None if it has not.
        seed: of random choices, such as the order of sequences.
        resources: how to compute.
        journal: keeps finished work, so that it is not done again. Only rank 0 has one.
        progress: called with (blocks done, number of blocks, state) after every block, and once before the first.
        began: when this process began with the run, on the clock of `time.perf_counter`.
    """

    decoder: Decoder
    recipe: Recipe
    calibration: Calibration
    training_set: TrainingSet | None = None
    dense: Decoder | None = None
    seed: int = 0
    resources: Resources = PLAIN
    journal: Journal | None = None
    progress: Progress = silent
    began: float = field(default_factory=time.perf_counter)

    @property
    def spent(self) -> float:
        """Seconds that the run has taken so far: all of this process, and what is known of interrupted ones."""
        earlier = self.journal.earlier if self.journal is not None else 0.0
        return earlier + time.perf_counter() - self.began

    @cached_property
    def share(self) -> Share:
        """The calibration sequences of this rank."""
        return Share.of(self.calibration.samples, self.resources.batch)

    def kept(self, block: Block) -> dict[str, Tensor]:
        """The tensors of a finished block, which the journal of rank 0 has."""
        return ranks.tensors_from_first(self.journal.tensors(block.index) if self.journal is not None else {})
