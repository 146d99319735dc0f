"""The sequences to distil on, which are run through the dense model unit by unit.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from besa.methods.distilling import Study
from besa.models.activations import HiddenStates
from besa.models.ends import embedded
from besa.models.units import Unit
from besa.pruning.run import Run
from besa.system.ranks import Share


@dataclass(frozen=True)
class Studied:
    """A rank's share of the sequences, and their outputs of the last unit.

    Attributes:
        study: all sequences.
        share: those of this rank.
        outputs_NTC: of the last unit that they went through.
        batch: sequences in a forward pass.
    """

    study: Study
    share: Share
    outputs_NTC: HiddenStates
    batch: int

    @classmethod
    def begun(cls, run: Run, study: Study) -> Studied:
        """The sequences before the first unit."""
        share = Share.of(study.calibration.samples, run.resources.batch)
        with run.decoder.embeddings(run.resources.device):
            return cls(study, share, _embedded(run, study, share, run.resources.batch), run.resources.batch)

    def through(self, unit: Unit) -> None:
        """Run a unit that is dense."""
        for block in unit.blocks:
            block.run(self.outputs_NTC, self.batch, into=self.outputs_NTC)

    def inputs_NTC(self, run: Run) -> HiddenStates:
        """The inputs of the first block, one sequence at a time; the embeddings are on the device."""
        return _embedded(run, self.study, self.share, 1)

    @property
    def tokens_NT(self) -> Tensor:
        """The token ids of this rank."""
        return self.study.calibration.tokens_NT[self.share.places]


def _embedded(run: Run, study: Study, share: Share, batch: int) -> HiddenStates:
    decoder = run.decoder
    return embedded(decoder.model, decoder.blocks, study.calibration.tokens_NT, batch, run.resources.room, share)
