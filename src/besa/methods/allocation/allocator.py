"""What besa asks of every allocation."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from besa.counting.budget import Budget, zeros_for
from besa.methods.allocation.descent import Descent
from besa.methods.allocation.problem import Allocated, BlockProblem
from besa.models.blocks import Block
from besa.models.units import Granularity
from besa.settings import Settings


class Allocator(Settings):
    """Base of all allocations. By default it needs nothing but the ranks of a block's weights.

    Attributes:
        whole_structures: whether it prunes whole channels and heads; the reconstruction must then keep the mask.
        shaped: whether zeros follow a pattern or whole units; targets by block and quantisation would break these.
    """

    whole_structures: ClassVar[bool] = False
    shaped: ClassVar[bool] = False

    @property
    def scope(self) -> Granularity:
        """Which linears share a budget, and on whose output a loss is."""
        return "block"

    @property
    def descent(self) -> Descent | None:
        """How it learns; None where it does not."""
        return None

    @property
    def teacher_path(self) -> Literal["dense", "pruned"] | None:
        """The path whose states are the teacher's inputs; None where it has no teacher."""
        return None

    @property
    def probes_every(self) -> int | None:
        """One calibration sequence in so many is sent back through each block; None where none is."""
        return None

    @property
    def compares_errors(self) -> bool:
        """Whether it compares the output errors that importance stands for: between rows, linears or units."""
        return False

    @property
    def sorts_linears(self) -> bool:
        """Whether all weights of a linear are sorted at once, and not row by row."""
        return False

    @property
    def group(self) -> int | None:
        """Consecutive columns of which every group keeps as many; None where there is no such pattern."""
        return None

    @property
    def only_sparsity(self) -> float | None:
        """The one sparsity that it can make; None where it can make any."""
        return None

    def budget(self, block: Block, names: Sequence[str], sparsity: float) -> Budget:
        """The zeros nearest to the sparsity that these linears of a block can have together.

        Args:
            block: of the model.
            names: full names of linears of it.
            sparsity: of them together.

        Raises:
            BesaError: the block has no zeros of that shape.
        """
        weights = sum(block.prunables[name].numel for name in names)
        return Budget(tuple(names), weights, zeros_for(sparsity, weights))

    def learning_bytes(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Bytes of its parameters and their gradients while it learns linears.

        Args:
            shapes: rows and columns of each linear.
        """
        return 0

    @abstractmethod
    def allocate(self, problem: BlockProblem) -> Allocated:
        """Zeros of every row, adding up to the budgets of the problem.

        Raises:
            BesaError: the block has more zeros already than it is to end with.
        """
