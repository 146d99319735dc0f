"""Depth: whole blocks go, or the attention or the MLP of some blocks.

Shape suffixes: O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar, Literal

import torch
from pydantic import Field

from besa.counting.budget import Budget
from besa.errors import BesaError
from besa.methods.allocation.allocator import Allocator
from besa.methods.allocation.problem import Allocated, BlockProblem
from besa.methods.targets.change import Change
from besa.models.blocks import Block
from besa.models.layers import Layers, biases, check_passes_on, layer
from besa.models.units import Unit


class Depth(Allocator):
    """All weights of the layers that change the hidden states least become zero, and their biases with them.

    A block without its weights passes its input on, and `checkpoint.shrinking` leaves it out. All layers are measured
    once, on the dense model. A block of which a matrix is skipped stays.
    """

    method: Literal["depth"] = "depth"
    layers: Layers = Field(default="both", description="what goes of a block: both layers, its attention or its mlp")
    blocks: int | None = Field(
        default=None, ge=0, description="how many blocks lose it; by default one, or what is nearest to the sparsity"
    )
    whole_structures: ClassVar[bool] = True
    shaped: ClassVar[bool] = True
    even: ClassVar[bool] = True

    @property
    def decided_by(self) -> str | None:
        """`blocks`, if it is set."""
        return None if self.blocks is None else "allocation.blocks"

    @property
    def targeting(self) -> Change:
        """How much each layer changes the hidden states."""
        return Change(layers=self.layers)

    def budgets(
        self, blocks: Sequence[Block], names: Sequence[Sequence[str]], sparsity: float, targets: Sequence[float] | None
    ) -> list[Budget]:
        """All weights of the layers with the least change are zeros; of equal ones, of the later.

        Args:
            blocks: of the model.
            names: full names of the linears that are pruned, by block.
            sparsity: of all of them together.
            targets: the change of each layer; None before it is measured.

        Raises:
            BesaError: fewer blocks than `blocks` can lose their layer, or nothing would stay.
        """
        for block, own in zip(blocks, names, strict=True):
            if not own:
                one = next(iter(block.prunables))
                raise BesaError(f"All of {block.name} is skipped: --skip '{one}' is enough to keep the block.")
        layers = [layer(block, self.layers) for block in blocks]
        sizes = [sum(block.prunables[name].numel for name in own) for block, own in zip(blocks, layers, strict=True)]
        whole = [sum(block.prunables[name].numel for name in own) for block, own in zip(blocks, names, strict=True)]
        changes = targets or [0.0] * len(blocks)
        order = sorted(range(len(blocks)), key=lambda index: (changes[index], -index))
        order = [index for index in order if set(layers[index]) <= set(names[index])]
        number = self.blocks
        if number is None:
            upto = [0, *accumulate(sizes[index] for index in order)]
            number = min(range(len(upto)), key=lambda n: abs(upto[n] - sparsity * sum(whole)))
            number = max(number, 1 if sparsity else 0)
        if number > len(order):
            raise BesaError(f"Only {len(order)} of {len(blocks)} blocks could go: set allocation.blocks lower.")
        if self.layers == "both" and number == len(blocks):
            raise BesaError(f"All {number} blocks would go: set allocation.blocks or the sparsity lower.")
        gone = set(order[:number])
        return [
            Budget(tuple(own), weights, sizes[index] if index in gone else 0)
            for index, (own, weights) in enumerate(zip(names, whole, strict=True))
        ]

    def kept(self, block: Block, budget: Budget) -> dict[str, tuple[int, int]]:
        """The block itself, or its layer."""
        return {"blocks" if self.layers == "both" else self.layers: (1, 0 if budget.zeros else 1)}

    def allocate(self, problem: BlockProblem) -> Allocated:
        """All weights of the layer if it goes; none otherwise, but the weights that are zero already.

        Raises:
            BesaError: something would be left of a block that goes.
        """
        assert isinstance(problem.block, Unit)
        (block,) = problem.block.blocks
        (budget,) = problem.budgets
        counts = {name: linear.zeros_O for name, linear in problem.linears.items()}
        if not budget.zeros:
            return Allocated(counts)
        if self.layers == "both" and len(problem.inputs_NTC):  # of this rank
            check_passes_on(block, problem.inputs_NTC[:1].to(problem.device))
        own = layer(block, self.layers)
        counts |= {name: torch.full_like(counts[name], problem.linears[name].w_OI.shape[1]) for name in own}
        gone = tuple(f"{block.name}.{name}" for name in biases(block, own))
        return Allocated(counts, biases=gone)
