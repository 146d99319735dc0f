"""Structured: prune whole channels of the feed-forward and whole heads.

Shape suffixes: O rows, I columns, B blocks, S structures (channels of the feed-forward, or heads).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from besa.counting.budget import Budget
from besa.counting.masks import rank
from besa.counting.precision import widest
from besa.errors import BesaError
from besa.methods.allocation.allocator import Allocator
from besa.methods.allocation.problem import Allocated, BlockProblem, RankedLinear
from besa.methods.apportioning import apportion
from besa.models.blocks import Block
from besa.models.couplings import Coupling, alike, check, couplings
from besa.models.units import Unit


class Structured(Allocator):
    """Prune the channels, and the key-value heads with their query heads, whose removal changes the block least.

    The score of a structure is the squared error in the output of the linear that reads it, if its columns are
    removed. The rows that write the structure go with it. `checkpoint.shrinking` writes the rest as smaller dense
    matrices.

    Every block loses the same number, unless targets say how much each block loses. Then blocks differ in channels,
    and the whole model meets the sparsity; heads stay the same in all.
    """

    method: Literal["structured"] = "structured"
    heads: float = Field(
        default=0.0, ge=0, lt=1, description="share of key-value heads to prune; the feed-forward loses the rest"
    )
    multiple: int = Field(default=8, ge=1, description="the number of feed-forward channels kept is a multiple of this")
    whole_structures: ClassVar[bool] = True
    shaped: ClassVar[bool] = True

    @property
    def compares_errors(self) -> bool:
        """True: between structures, summed up over their columns."""
        return True

    def structures(self, block: Block, names: Sequence[str]) -> list[Coupling]:
        """The channels of the feed-forward."""
        return [coupling for coupling in couplings(block) if coupling.kind == "ffn" and set(coupling.names) <= {*names}]

    def budgets(
        self, blocks: Sequence[Block], names: Sequence[Sequence[str]], sparsity: float, targets: Sequence[float] | None
    ) -> list[Budget]:
        """The budgets nearest to the targets that together come nearest to the sparsity.

        Raises:
            BesaError: as `budget`; or the blocks have different shapes.
        """
        alike(blocks)
        even = super().budgets(blocks, names, sparsity, None)
        if len({(budget.weights, budget.zeros) for budget in even}) > 1:
            raise BesaError(
                "structured pruning takes the same structures of every block, and these blocks differ in the linears "
                "that count: skip the same linears in all of them, such as those of attention (--skip '*attn*')."
            )
        if targets is None:
            return even
        weights = even[0].weights
        taken = [self._gone(block, own, sparsity * weights) for block, own in zip(blocks, names, strict=True)]
        heads = sum(number * coupling.weights for coupling, number in taken[0][:-1])
        ffn = taken[0][-1][0]
        steps = -(-ffn.structures // self.multiple) - 1  # that a block can lose, of `multiple` channels
        if not steps:
            return even
        channels_B = (torch.tensor(targets, dtype=torch.float64) * weights - heads) / ffn.weights  # that should go
        gone = self._steps(channels_B, steps, self.multiple * (steps + 1) - ffn.structures)
        kept = [ffn.structures if not number else self.multiple * (steps + 1 - number) for number in gone]
        return [
            Budget(tuple(own), weights, heads + (ffn.structures - number) * ffn.weights)
            for own, number in zip(names, kept, strict=True)
        ]

    def _steps(self, channels_B: Tensor, most: int, short: int) -> list[int]:
        """Steps of `multiple` channels that each block loses: together the channels nearest to those that should go.

        Args:
            channels_B: channels of each block that should go, any real number.
            most: steps that a block can lose.
            short: channels that the first step of a block has fewer, so that a multiple stays.
        """
        steps_B = torch.full((len(channels_B),), most)
        ideal_B = torch.where(channels_B > 0, channels_B + short, channels_B) / self.multiple
        near = min(max(round(float(ideal_B.sum())), 0), most * len(steps_B))
        reach = len(steps_B) if short else 0  # blocks that lose something decide how many first steps there are
        totals = range(max(near - reach, 0), min(near + reach, most * len(steps_B)) + 1)
        tried = [apportion(ideal_B / most, steps_B, total, torch.zeros_like(steps_B)).tolist() for total in totals]

        def off(gone: list[int]) -> float:
            return abs(sum(self.multiple * number - short for number in gone if number) - float(channels_B.sum()))

        return min(tried, key=off)

    def budget(self, block: Block, names: Sequence[str], sparsity: float) -> Budget:
        """The budget of these linears: the number of zeros of whole structures nearest to the sparsity.

        Raises:
            BesaError: the block has no such structures, a linear of a structure stays dense, or none would be left.
        """
        weights = sum(block.prunables[name].numel for name in names)
        gone = self._gone(block, names, sparsity * weights)
        return Budget(tuple(names), weights, sum(number * coupling.weights for coupling, number in gone))

    def _gone(self, block: Block, names: Sequence[str], zeros: float) -> list[tuple[Coupling, int]]:
        """How many structures of each coupling to prune, to make about `zeros` zeros."""
        by_kind = {coupling.kind: coupling for coupling in couplings(block) if set(coupling.names) <= set(names)}
        if "ffn" not in by_kind or (self.heads and "heads" not in by_kind):
            missing = "heads" if "ffn" in by_kind else "feed-forward"
            raise BesaError(
                f"{block.name} has no {missing} that can be pruned whole: its linears are fused, belong to experts, "
                "are skipped in part, or have unknown names; choose another allocation."
            )
        gone = []
        if self.heads:
            heads = by_kind["heads"]
            gone.append((heads, round(self.heads * heads.structures)))
            zeros -= gone[0][1] * heads.weights
            if gone[0][1] == heads.structures:
                raise BesaError(f"{block.name} would have no heads left: set allocation.heads lower.")
            if zeros < 0:
                raise BesaError("allocation.heads takes more than the sparsity asks for: set it lower.")
        ffn = by_kind["ffn"]
        asked = ffn.structures - zeros / ffn.weights
        kept = min(ffn.structures, self.multiple * int(asked / self.multiple + 0.5))
        if kept < 1 and zeros:
            raise BesaError(
                f"{block.name} would have no feed-forward channels left: ask for less sparsity, or set "
                "allocation.heads higher."
            )
        if ffn.structures - asked <= abs(kept - asked):  # a width that is no multiple has a shorter first step
            kept = ffn.structures
        return [*gone, (ffn, ffn.structures - kept)]

    def kept(self, block: Block, budget: Budget) -> dict[str, tuple[int, int]]:
        """Channels and heads of the block before and after, by kind."""
        gone = self._gone(block, budget.names, budget.zeros)
        return {coupling.kind: (coupling.structures, coupling.structures - number) for coupling, number in gone}

    def allocate(self, problem: BlockProblem) -> Allocated:
        """The zeros of the rows and columns of the pruned structures, plus the weights that are zero already.

        Raises:
            BesaError: as `budget`; or a structure still has an effect when nothing reads it.
        """
        assert isinstance(problem.block, Unit)
        (block,) = problem.block.blocks
        (budget,) = problem.budgets
        weights = {name: linear.w_OI for name, linear in problem.linears.items()}
        for coupling, number in self._gone(block, budget.names, budget.zeros):
            gone_S = lowest_structures(coupling, problem.linears, number)
            if len(problem.inputs_NTC):  # of this rank
                check(block, coupling, gone_S, problem.inputs_NTC[:1].to(problem.device))
            weights |= coupling.without(weights, gone_S)
        counts = {name: (w_OI == 0).sum(dim=1) for name, w_OI in weights.items()}
        # Zeros come first in the order of every row, and so do the columns of pruned units.
        ranks = {name: rank(linear.importance_OI, weights[name]) for name, linear in problem.linears.items()}
        return Allocated(counts, ranks=ranks)


def lowest_structures(coupling: Coupling, linears: Mapping[str, RankedLinear], number: int) -> Tensor:
    """Which structures (S,) to prune, boolean: those with the lowest squared errors; of equal ones, the earlier."""
    ((name, size),) = coupling.columns.items()
    linear = linears[name]
    error_I = linear.errors_OI.sum(dim=0, dtype=widest(linear.w_OI.device))
    order_S = error_I.reshape(coupling.structures, size).sum(dim=1).argsort(stable=True)
    gone_S = torch.zeros(coupling.structures, dtype=torch.bool, device=error_I.device)
    gone_S[order_S[:number]] = True
    return gone_S
