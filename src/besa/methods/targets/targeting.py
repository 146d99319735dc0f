"""The interface of targets: their capabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from besa.settings import Settings

if TYPE_CHECKING:
    from besa.methods.targets.measuring import Measuring


class Targeting(Settings):
    """Base of all targets. By default every block has the sparsity of the model, and nothing is measured."""

    @property
    def measuring(self) -> Measuring | None:
        """The method that measures each block; None if all blocks have the same sparsity."""
        return None

    def loss_every(self, samples: int) -> int | None:
        """They need gradients of the dense model's loss, from one sequence in so many; None if they need none.

        Args:
            samples: calibration sequences.
        """
        return None

    @property
    def forwards(self) -> int:
        """Forward passes over the measured sequences through all blocks, but for those gradients."""
        return 0

    @property
    def trials(self) -> int:
        """Number of pruned models that are compared."""
        return 0

    @property
    def paths(self) -> int:
        """Hidden states of every measured sequence that are kept at once, but for those gradients."""
        return 0
