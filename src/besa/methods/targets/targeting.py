"""The interface of targets: their capabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from besa.settings import Settings

if TYPE_CHECKING:
    from besa.methods.targets.bounded import Bounded


class Targeting(Settings):
    """Base of all targets. By default every block has the sparsity of the model, and nothing is measured."""

    @property
    def measuring(self) -> Bounded | None:
        """The method that measures a sparsity for each block; None if all blocks have the same."""
        return None

    @property
    def loss_every(self) -> int | None:
        """They need gradients of the dense model's loss, from one sequence in so many; None if they need none."""
        return None

    @property
    def passes(self) -> float:
        """Forward passes over the calibration set through all blocks that measuring takes, but for those gradients."""
        return 0.0

    @property
    def trials(self) -> int:
        """Number of pruned models that are compared."""
        return 0

    def sequences_kept(self, samples: int, blocks: int) -> int:
        """Number of sequences whose hidden states are kept at once, after those gradients.

        Args:
            samples: calibration sequences.
            blocks: of the model.
        """
        return 0
