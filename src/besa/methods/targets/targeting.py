"""What besa asks of every way to set the sparsities of the blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from besa.settings import Settings

if TYPE_CHECKING:
    from besa.methods.targets.bounded import Bounded


class Targeting(Settings):
    """Base of all targets; by default every block has the sparsity of the model and nothing is measured.

    Attributes:
        needs_loss: the gradient of the model's loss is sent back through all blocks.
    """

    needs_loss: ClassVar[bool] = False

    @property
    def measuring(self) -> Bounded | None:
        """What measures the blocks, so that they differ in sparsity; None where they do not differ."""
        return None

    @property
    def passes(self) -> float:
        """Forward passes of the calibration set through all blocks that it takes."""
        return 0.0

    @property
    def trials(self) -> int:
        """How many pruned models are tried."""
        return 0

    def sequences_kept(self, samples: int, blocks: int) -> int:
        """Hidden states that it keeps at once, in sequences.

        Args:
            samples: calibration sequences.
            blocks: of the model.
        """
        return 0
