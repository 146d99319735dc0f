"""Sensitivity: blocks whose weights matter more to the model's loss lose less."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from besa.methods.targets.bounded import Bounded, Survey
from besa.methods.targets.fisher import one_threshold


class LossSensitivity(Bounded):
    """Every block goes a part of the way from the model's sparsity to what `fisher.one_threshold` gives it."""

    method: Literal["sensitivity"] = "sensitivity"
    strength: float = Field(default=0.5, ge=0, le=1, description="part of the way from uniform to that threshold")
    needs_loss: ClassVar[bool] = True

    @property
    def passes(self) -> float:
        """A forward pass, then another with a backward pass to activations, which counts as one."""
        return 3 / self.every

    def sequences_kept(self, samples: int, blocks: int) -> int:
        """Those that are looked at, at the input of every block and at the output of the last."""
        return -(-samples // self.every) * (blocks + 1)

    def measure(self, survey: Survey) -> list[float]:
        """The sparsity that each block wants: a forward and a backward pass, one block at a time in both directions."""
        return one_threshold(survey, self.tokens(survey)).part_way(self.strength)
