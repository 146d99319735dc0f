"""The interface of allocations: their capabilities and `allocate`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

from besa.counting.budget import Budget, zeros_for
from besa.methods.allocation.descent import Descent
from besa.methods.allocation.problem import Allocated, BlockProblem
from besa.methods.targets.targeting import Targeting
from besa.models.blocks import Block
from besa.models.couplings import Coupling
from besa.models.units import Granularity
from besa.settings import Settings


class Allocator(Settings):
    """Base of all allocations. The defaults describe one that needs only the ranks of a block's weights.

    Attributes:
        whole_structures: whether it prunes whole channels and heads; the reconstruction must then keep the mask.
        shaped: whether zeros follow a pattern or whole structures, which quantisation would break.
        even: whether it needs every block to have the sparsity of the model.
    """

    whole_structures: ClassVar[bool] = False
    shaped: ClassVar[bool] = False
    even: ClassVar[bool] = False

    @property
    def targeting(self) -> Targeting | None:
        """Targets of its own, in place of the recipe's; None if it has none."""
        return None

    @property
    def scope(self) -> Granularity:
        """Which linears share a budget, and whose output the loss compares."""
        return "block"

    @property
    def descent(self) -> Descent | None:
        """Settings of its descent; None if it does not learn."""
        return None

    @property
    def teacher_path(self) -> Literal["dense", "pruned"] | None:
        """The path whose hidden states are the teacher's inputs; None without a teacher."""
        return None

    def loss_every(self, samples: int) -> int | None:
        """It needs gradients of the dense model's loss, from one sequence in so many; None if it needs none.

        Args:
            samples: calibration sequences.
        """
        return None

    @property
    def compares_errors(self) -> bool:
        """Whether it compares output errors, as importance gives them, between rows, linears or units."""
        return False

    @property
    def sorts_linears(self) -> bool:
        """Whether it sorts all weights of a linear at once, not row by row."""
        return False

    @property
    def group(self) -> int | None:
        """Columns in each group of an n:m pattern; None without such a pattern."""
        return None

    @property
    def only_sparsity(self) -> float | None:
        """The only sparsity that it can reach; None if it can reach any."""
        return None

    @property
    def decided_by(self) -> str | None:
        """The setting that decides how much goes in place of the sparsity; None if the sparsity does."""
        return None

    def budget(self, block: Block, names: Sequence[str], sparsity: float) -> Budget:
        """The budget of these linears: the number of zeros, among those it can make, nearest to the sparsity.

        Args:
            block: of the model.
            names: full names of linears in the block.
            sparsity: of these linears together.

        Raises:
            BesaError: the block has no units that it could prune whole.
        """
        weights = sum(block.prunables[name].numel for name in names)
        return Budget(tuple(names), weights, zeros_for(sparsity, weights))

    def budgets(
        self, blocks: Sequence[Block], names: Sequence[Sequence[str]], sparsity: float, targets: Sequence[float] | None
    ) -> list[Budget]:
        """The budget of each block, of an allocation of whole structures.

        Args:
            blocks: of the model.
            names: full names of the linears that are pruned, by block.
            sparsity: of all of them together.
            targets: of each block, as its targets measured them; None if they measure nothing.

        Raises:
            BesaError: as `budget`.
        """
        shares = [sparsity] * len(blocks) if targets is None else targets
        return [self.budget(*each) for each in zip(blocks, names, shares, strict=True)]

    def shares(self, budget: Budget, sizes: Mapping[str, int]) -> Iterator[tuple[tuple[str, ...], int]]:
        """Linears that share zeros, and how many they share: by default those of the whole budget.

        Args:
            budget: of linears.
            sizes: numbers of their weights, by full name.
        """
        yield budget.names, budget.zeros

    def structures(self, block: Block, names: Sequence[str]) -> list[Coupling]:
        """The structures of a block whose numbers the targets decide; none if its weights go one by one.

        Args:
            block: of the model.
            names: full names of its linears that are pruned.
        """
        return []

    def kept(self, block: Block, budget: Budget) -> Mapping[str, tuple[int, int]]:
        """How many structures the block had and how many stay, by kind; empty if its weights go one by one.

        Args:
            block: of the model.
            budget: of the block.
        """
        return {}

    def learning_bytes(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Bytes of its parameters and their gradients while it learns.

        Args:
            shapes: rows and columns of each linear.
        """
        return 0

    def summed_bytes(self, learning: Sequence[tuple[int, int]], clipping: int) -> int:
        """Bytes that ranks add up while it decides, at most; none if each decides by itself.

        Args:
            learning: rows and columns of the linears that may lose some of their weights.
            clipping: numbers of the clippings that are learned with it.
        """
        return 0

    @abstractmethod
    def allocate(self, problem: BlockProblem) -> Allocated:
        """The zeros of every row. They add up to the budgets of the problem.

        Raises:
            BesaError: the block already has more zeros than its budget.
        """
