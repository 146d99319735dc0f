"""What is pruned at once: one block, two consecutive ones, or the attention of a block and then the rest of it.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from besa.errors import BesaError
from besa.models.activations import HiddenStates
from besa.models.blocks import Block, send
from besa.models.prunable import Prunable

Granularity = Literal["linear", "attn-mlp", "block", "two-blocks"]


@dataclass(frozen=True)
class Unit:
    """Consecutive blocks as one function of hidden states, of which some matrices may be silent.

    A silent matrix is taken for zero. With those of the MLP silent, a block puts out the residual stream after its
    attention, wherever the family adds the two: one after the other, or both to the block's input.

    Attributes:
        blocks: in the order they are run in.
        silent: full names of matrices.
    """

    blocks: tuple[Block, ...]
    silent: tuple[str, ...] = ()

    @cached_property
    def prunables(self) -> dict[str, Prunable]:
        """The prunable matrices of all its blocks by full module path, in module order."""
        return {name: prunable for block in self.blocks for name, prunable in block.prunables.items()}

    @property
    def index(self) -> int:
        """Position of its first block in the decoder."""
        return self.blocks[0].index

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return next(self.blocks[0].module.parameters()).device

    def weight(self, name: str) -> Tensor:
        """The prunable matrix (O, I) of that name, as a view of what its block holds now."""
        return next(block for block in self.blocks if name in block.prunables).weight(name)

    def silencing(self, names: tuple[str, ...]) -> Unit:
        """The same blocks with these matrices silent."""
        return replace(self, silent=names)

    def __call__(self, x_NTC: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Output (N, T, C) of the last block for hidden states (N, T, C); arguments as of `Block`."""
        silent = {name: torch.zeros_like(self.weight(name)) for name in self.silent}
        given = {**(weights or {}), **silent}
        for block in self.blocks:
            own = {name: given[name] for name in block.prunables if name in given}
            x_NTC = block(x_NTC, own or None)
        return x_NTC

    def run(self, x_NTC: HiddenStates, batch: int, into: HiddenStates | None = None) -> None:
        """Send all sequences through the blocks; arguments as of `Block.run`.

        Raises:
            BesaError: an output is NaN or infinite.
        """
        send(self, self.blocks[-1].name, x_NTC, batch, self.device, into)


@dataclass(frozen=True)
class Part:
    """Matrices of a unit that are pruned together.

    Attributes:
        names: their full names.
        silent: matrices that are silent where the effect is looked at.
    """

    names: tuple[str, ...]
    silent: tuple[str, ...] = ()


def units(blocks: Sequence[Block], granularity: Granularity) -> list[Unit]:
    """The decoder, cut into what is pruned at once; the last of an odd number of blocks stands alone."""
    size = 2 if granularity == "two-blocks" else 1
    return [Unit(tuple(blocks[start : start + size])) for start in range(0, len(blocks), size)]


def parts(unit: Unit, granularity: Granularity) -> list[Part]:
    """The parts of a unit, in the order they are pruned in.

    Raises:
        BesaError: attention is asked for apart, and the block has no module of that name beside others.
    """
    names = tuple(unit.prunables)
    if granularity != "attn-mlp":
        return [Part(names)]
    (block,) = unit.blocks
    start = len(block.name) + 1
    attention = tuple(name for name in names if re.match(r"[^.]*att(n|ention)", name[start:]))
    rest = tuple(name for name in names if name not in attention)
    if not attention or not rest:
        raise BesaError(
            f"{block.name} has no attention that could be told from its MLP by name: use allocation.granularity=block."
        )
    return [Part(attention, silent=rest), Part(rest)]


def sharing(unit: Unit, granularity: Granularity) -> list[tuple[str, ...]]:
    """Which matrices of a unit share a budget.

    Raises:
        BesaError: as `parts`.
    """
    if granularity == "linear":
        return [(name,) for name in unit.prunables]
    return [part.names for part in parts(unit, granularity)]
