"""Sensitivity: blocks whose weights matter more to the model's loss lose fewer weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from besa.methods.fisher import loss_gradients
from besa.methods.survey import Survey
from besa.methods.targets.bounded import Bounded


class LossSensitivity(Bounded):
    """The sparsity of a block lies between that of the model and that of one threshold (`fisher`)."""

    method: Literal["sensitivity"] = "sensitivity"
    strength: float = Field(default=0.5, ge=0, le=1, description="part of the way from uniform to that threshold")

    def loss_every(self, samples: int) -> int:
        """One calibration sequence in this many is measured."""
        return self.every(samples)

    def measure(self, survey: Survey) -> list[float]:
        """A sparsity for each block, from the gradients.

        Raises:
            BesaError: gradients are NaN or infinite.
        """
        return loss_gradients(survey, self.every(survey.calibration.samples)).part_way(self.strength)
