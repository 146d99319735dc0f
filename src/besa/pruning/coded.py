"""Quantised weights: how a block that has them, or will have them, is written to the journal and read back.

Shape suffixes: O rows, I columns, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from besa.methods.recipe import Recipe
from besa.models.blocks import Block
from besa.models.streaming import Decoder
from besa.quantization import Coding, Grid, Quantized, Unrounded
from besa.storage.formats import codes, unrounded


@dataclass
class Coded:
    """The quantised weights of a unit, by full name.

    Attributes:
        quantized: all of them.
        unrounded: weights that a sweep has moved, as they were before rounding.
    """

    quantized: dict[str, Quantized] = field(default_factory=dict)
    unrounded: dict[str, Unrounded] = field(default_factory=dict)


def round_block(block: Block, grids: Mapping[str, Grid], quantization: Coding) -> dict[str, Quantized]:
    """Round, in place, the linears of a block that have a grid; return them by full name."""
    quantized = {}
    for name, grid in grids.items():
        if name in block.prunables:
            w_OI = block.weight(name).detach()
            quantized[name] = Unrounded(w_OI, grid.to(w_OI.device), quantization.symmetric).quantized()
            w_OI.copy_(quantized[name].weight())
    return quantized


def in_files(decoder: Decoder, block: Block, quantized: Mapping[str, Quantized], as_codes: bool) -> dict[str, Tensor]:
    """All tensors of an open block, named as in the checkpoint's files.

    Args:
        decoder: of the block.
        block: with its final weights.
        quantized: by full name, of this block and others.
        as_codes: store quantised weights as codes; else as the numbers they stand for.
    """
    coded = {decoder.name_in_files(name): quantized[name] for name in block.prunables if name in quantized and as_codes}
    return codes.encode(decoder.stored(block), coded)


def to_keep(decoder: Decoder, block: Block, coded: Coded, recipe: Recipe, as_codes: bool) -> dict[str, Tensor]:
    """The tensors of an open block for the journal: unrounded weights with their grids, if they are still to learn.

    Args:
        decoder: of the block.
        block: with its weights.
        coded: quantised weights of the block and others.
        recipe: the method.
        as_codes: as for `in_files`.
    """
    if not recipe.rounds_last:
        return in_files(decoder, block, coded.quantized, as_codes)
    moved = {name: coded.unrounded[name] for name in block.prunables if name in coded.unrounded}
    return unrounded.encode(decoder.stored(block), moved)


def put_back(decoder: Decoder, block: Block, tensors: dict[str, Tensor], recipe: Recipe) -> dict[str, Grid]:
    """Load what `to_keep` gave into an open block, rounded; returns the grids of weights that are still to learn."""
    coding = recipe.quantization.coding
    if coding is None or not recipe.rounds_last:
        decoder.load_tensors(block, codes.decode(tensors, coding) if coding is not None else tensors)
        return {}
    tensors, grids = unrounded.decode(tensors, coding.bits)
    decoder.load_tensors(block, tensors)
    round_block(block, grids, coding)
    return grids
