"""What the teacher of distilling computes: sequences that go through the dense model unit by unit.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from besa.methods.distilling import TrainingSet
from besa.models.activations import HiddenStates
from besa.models.ends import embedded
from besa.models.units import Unit
from besa.pruning.run import Run
from besa.system.ranks import Share


@dataclass(frozen=True)
class TeacherOutputs:
    """A rank's share of the sequences to distil on, and their outputs of the last unit.

    Attributes:
        training_set: all sequences.
        share: those of this rank.
        outputs_NTC: of the last unit that they went through.
        batch: sequences in a forward pass.
    """

    training_set: TrainingSet
    share: Share
    outputs_NTC: HiddenStates
    batch: int

    @classmethod
    def begun(cls, run: Run, training_set: TrainingSet) -> TeacherOutputs:
        """The sequences before the first unit."""
        batch = run.resources.batch
        share = Share.of(training_set.calibration.samples, batch)
        with run.decoder.embeddings(run.resources.device):
            return cls(training_set, share, _embedded(run, training_set, share, batch), batch)

    def through(self, unit: Unit) -> None:
        """Run a unit that is dense."""
        for block in unit.blocks:
            block.run(self.outputs_NTC, self.batch, into=self.outputs_NTC)

    def inputs_NTC(self, run: Run) -> HiddenStates:
        """The inputs of the first block, one sequence at a time; the embeddings are on the device."""
        return _embedded(run, self.training_set, self.share, 1)

    @property
    def tokens_NT(self) -> Tensor:
        """The token ids of this rank."""
        return self.training_set.calibration.tokens_NT[self.share.places]


def _embedded(run: Run, training_set: TrainingSet, share: Share, batch: int) -> HiddenStates:
    decoder, tokens_NT = run.decoder, training_set.calibration.tokens_NT
    return embedded(decoder.model, decoder.blocks, tokens_NT, batch, run.resources.room, share)
