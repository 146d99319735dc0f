"""Sensitivity: blocks whose weights matter more to the model's loss lose fewer weights."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from besa.methods.fisher import one_threshold
from besa.methods.survey import Survey
from besa.methods.targets.bounded import Bounded


class LossSensitivity(Bounded):
    """The sparsity of a block lies between that of the model and that of one threshold (`fisher.one_threshold`)."""

    method: Literal["sensitivity"] = "sensitivity"
    strength: float = Field(default=0.5, ge=0, le=1, description="part of the way from uniform to that threshold")
    needs_loss: ClassVar[bool] = True

    @property
    def passes(self) -> float:
        """A forward pass, then a forward and a backward pass; a backward pass to activations counts as one."""
        return 3 / self.every

    def sequences_kept(self, samples: int, blocks: int) -> int:
        """The measured sequences, at the input of every block and at the output of the last."""
        return -(-samples // self.every) * (blocks + 1)

    def measure(self, survey: Survey) -> list[float]:
        """A sparsity for each block, from a forward and a backward pass, one block at a time in both directions."""
        return one_threshold(survey, self.tokens(survey)).part_way(self.strength)
