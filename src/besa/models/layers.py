"""Layers that go whole: the attention, the MLP, or both, which is all of a block.

A layer whose matrices and their biases are zero adds nothing to the hidden states, so a block without both passes its
input on. That holds for blocks that add their layers to the residual stream, also if a norm without a bias follows a
layer. `check_passes_on` runs the block to see it.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from besa.errors import BesaError
from besa.models.blocks import Block
from besa.models.units import attention_and_rest

Layers = Literal["both", "attention", "mlp"]


def layer(block: Block, layers: Layers) -> tuple[str, ...]:
    """Full names of the matrices of these layers of a block.

    Raises:
        BesaError: one of the two layers is meant, and the block's module names do not tell them apart.
    """
    if layers == "both":
        return tuple(block.prunables)
    attention, rest = attention_and_rest(block)
    if not attention or not rest:
        raise BesaError(
            f"The module names of {block.name} do not separate attention and MLP: set allocation.layers=both."
        )
    return attention if layers == "attention" else rest


def biases(block: Block, names: Collection[str]) -> list[str]:
    """Names within the block of the biases of these matrices (full names): ``X.bias``, or ``X_bias`` of a stack."""
    parameters = dict(block.module.named_parameters())
    places = {block.prunables[name].parameter for name in names}
    possible = sorted(
        {*(f"{place.removesuffix('weight')}bias" for place in places), *(f"{each}_bias" for each in places)}
    )
    return [name for name in possible if name in parameters]


@torch.no_grad()
def without(block: Block, names: Collection[str], x_NTC: Tensor) -> Tensor:
    """The output (N, T, C) of a block whose matrices of these full names are zero, with their biases.

    Args:
        block: with the arguments of a call for hidden states of this shape.
        names: of its matrices.
        x_NTC: hidden states on the block's device.
    """
    zeros = {name: torch.zeros_like(block.weight(name)) for name in names}
    others = {name: torch.zeros_like(block.module.get_parameter(name)) for name in biases(block, names)}
    return block(x_NTC, zeros, others)


def passes_on(block: Block, x_NTC: Tensor) -> bool:
    """Whether the block returns its input to the bit if all its matrices are zero; arguments as of `without`."""
    return torch.equal(without(block, block.prunables, x_NTC), x_NTC)


def check_passes_on(block: Block, x_NTC: Tensor) -> None:
    """Check that nothing is left of a block without its matrices; arguments as of `passes_on`.

    Raises:
        BesaError: something is.
    """
    if not passes_on(block, x_NTC):
        raise BesaError(
            f"{block.name} still changes its input when all of its matrices are zero, so it cannot go as a whole: "
            "choose another allocation."
        )
