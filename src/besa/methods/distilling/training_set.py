"""What distilling learns from: the calibration set in every epoch, or further sequences of its texts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from besa.data.calibration import Calibration
from besa.data.mixture import evenly
from besa.methods.steps import split


def needed(samples: int, epochs: int) -> int:
    """Sequences that are held out, and those of so many epochs, each as long as one over the calibration set.

    Args:
        samples: of the calibration set.
        epochs: that have sequences of their own.
    """
    held, learned = _sizes(samples)
    return held + epochs * learned


@dataclass(frozen=True)
class TrainingSet:
    """The sequences of all epochs. One that is held out is in none of them.

    Attributes:
        calibration: the sequences.
        epochs: that have sequences of their own; later ones begin again with those of the first.
    """

    calibration: Calibration
    epochs: int = 1

    @classmethod
    def of(cls, drawn: Calibration, samples: int) -> TrainingSet:
        """A training set of as many whole epochs as were drawn; at least a calibration set must have been drawn.

        What is held out, and every epoch, has the texts of a mixture by their shares. The places of an epoch are spread
        over the whole set, so that ranks have equal work in it.

        Where some are left over, what each text of a mixture gave is no longer known, and not said.

        Args:
            drawn: sequences.
            samples: of the calibration set.
        """
        held, learned = _sizes(samples)
        epochs = (drawn.samples - held) // learned if learned else 1
        tokens_NT = drawn.tokens_NT[evenly(drawn.samples)[: needed(samples, epochs)]]
        parts = drawn.parts if len(tokens_NT) == drawn.samples else ()
        made = cls(replace(drawn, tokens_NT=tokens_NT.clone(), parts=parts), epochs)
        places = made.held + [place for epoch in range(epochs) for place in made.learned(epoch)]
        made.calibration.tokens_NT[places] = tokens_NT
        return made

    @property
    def held(self) -> list[int]:
        """Places of the sequences that are held out."""
        return split(self.calibration.samples, self.epochs)[0]

    def learned(self, epoch: int) -> list[int]:
        """Places of the sequences of an epoch, in their order."""
        return split(self.calibration.samples, self.epochs)[1][epoch % self.epochs :: self.epochs]


def _sizes(samples: int) -> tuple[int, int]:
    """How many sequences of a calibration set are held out, and learned from; one alone serves as both."""
    held = len(split(samples)[0])
    return held, samples - held
