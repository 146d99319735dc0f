"""What the methods that measure blocks have in common: bounds on the result.

Shape suffixes: N sequences, T tokens, B blocks.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from besa.methods.survey import Survey, one_in
from besa.methods.targets.measuring import Measuring


class Bounded(Measuring):
    """Blocks may differ in sparsity, each within bounds around the sparsity of the model."""

    sequences: int = Field(default=8, ge=1, description="calibration sequences that are measured; more if uneven")
    least_pruned: float = Field(
        default=0.6,
        ge=0,
        le=1,
        description="lower bound of a block's sparsity, as a share of the model's sparsity",
    )
    least_kept: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="lower bound of a block's density, as a share of the model's density",
    )

    def every(self, samples: int) -> int:
        """One calibration sequence in so many is measured."""
        return one_in(samples, self.sequences)

    def targets(self, measured: list[float], sizes: list[int], sparsity: float) -> list[float]:
        """The measured sparsities within the bounds."""
        return self.bounded(measured, sizes, sparsity)

    def bounded(self, measured: list[float], sizes: list[int], sparsity: float) -> list[float]:
        """The target of each block: one shift of all measured sparsities, clamped to the bounds, gives the right mean.

        Args:
            measured: a sparsity for each block, any real number.
            sizes: weights of each block.
            sparsity: of all blocks together.
        """
        low, high = self.least_pruned * sparsity, 1 - self.least_kept * (1 - sparsity)
        measured_B = torch.tensor(measured, dtype=torch.float64)
        share_B = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)

        def at(shift: float) -> Tensor:
            return (measured_B + shift).clamp(low, high)

        least, most = low - float(measured_B.max()), high - float(measured_B.min())
        for _ in range(60):
            middle = (least + most) / 2
            least, most = (middle, most) if float(at(middle) @ share_B) < sparsity else (least, middle)
        rates: list[float] = at((least + most) / 2).tolist()
        return rates

    def tokens(self, survey: Survey) -> Tensor:
        """The measured sequences (n, T)."""
        return survey.calibration.tokens_NT[:: self.every(survey.calibration.samples)]
