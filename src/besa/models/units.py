"""Units, which are pruned at once: one block, two consecutive blocks, or a block in two parts.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from besa.errors import BesaError
from besa.models.activations import HiddenStates
from besa.models.blocks import Block, send
from besa.models.prunable import Prunable

Granularity = Literal["linear", "attn-mlp", "block", "two-blocks"]


@dataclass(frozen=True)
class Unit:
    """Consecutive blocks as one function of hidden states, in which some matrices may be silent.

    A silent matrix counts as zero. If the matrices of the MLP are silent, the output is the residual stream after the
    attention. This holds whether the family adds MLP and attention one after the other or both to the block's input.

    Attributes:
        blocks: in the order in which they run.
        silent: full names of the silent matrices.
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
        """The device of its weights."""
        return next(self.blocks[0].module.parameters()).device

    def weight(self, name: str) -> Tensor:
        """The prunable matrix (O, I) of that name, as a view of the block's current weight."""
        return next(block for block in self.blocks if name in block.prunables).weight(name)

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of that full name."""
        block = next(block for block in self.blocks if name.startswith(f"{block.name}."))
        return block.module.get_parameter(name.removeprefix(f"{block.name}."))

    def silencing(self, names: tuple[str, ...]) -> Unit:
        """A unit of the same blocks in which these matrices are zero."""
        return replace(self, silent=names)

    def __call__(self, x_NTC: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Output (N, T, C) of the last block for hidden states (N, T, C); arguments as of `Block`."""
        silent = {name: torch.zeros_like(self.weight(name)) for name in self.silent}
        given = {**(weights or {}), **silent}
        for block in self.blocks:
            of_block = {name: given[name] for name in block.prunables if name in given}
            x_NTC = block(x_NTC, of_block or None)
        return x_NTC

    def run(self, x_NTC: HiddenStates, batch: int, into: HiddenStates | None = None) -> None:
        """Run the blocks on all sequences; arguments as of `Block.run`.

        Raises:
            BesaError: an output is NaN or infinite.
        """
        send(self, self.blocks[-1].name, x_NTC, batch, self.device, into)


@dataclass(frozen=True)
class Part:
    """Matrices of a unit that are pruned together.

    Attributes:
        names: full names of these matrices.
        silent: full names of the matrices that are silent while the part is observed.
    """

    names: tuple[str, ...]
    silent: tuple[str, ...] = ()


def units(blocks: Sequence[Block], granularity: Granularity) -> list[Unit]:
    """The units of a decoder. If a unit has two blocks and their number is odd, the last block is a unit by itself."""
    size = 2 if granularity == "two-blocks" else 1
    return [Unit(tuple(blocks[start : start + size])) for start in range(0, len(blocks), size)]


def parts(unit: Unit, granularity: Granularity) -> list[Part]:
    """The parts of a unit, in the order in which they are pruned.

    Raises:
        BesaError: attention and MLP are separate parts, and the block's module names do not tell them apart.
    """
    names = tuple(unit.prunables)
    if granularity != "attn-mlp":
        return [Part(names)]
    (block,) = unit.blocks
    attention, rest = attention_and_rest(block)
    if not attention or not rest:
        raise BesaError(
            f"The module names of {block.name} do not separate attention and MLP: use allocation.granularity=block."
        )
    return [Part(attention, silent=rest), Part(rest)]


def attention_and_rest(block: Block) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Full names of the matrices of the attention, and of all others; one is empty if module names do not tell."""
    start = len(block.name) + 1
    attention = tuple(name for name in block.prunables if re.match(r"[^.]*att(n|ention)", name[start:]))
    return attention, tuple(name for name in block.prunables if name not in attention)


def sharing(unit: Unit, granularity: Granularity) -> list[tuple[str, ...]]:
    """The names of the matrices of a unit, grouped by the budget that they share.

    Raises:
        BesaError: as `parts`.
    """
    if granularity == "linear":
        return [(name,) for name in unit.prunables]
    return [part.names for part in parts(unit, granularity)]
