"""Weights that are not rounded yet, beside their grids: what a journal holds of a block until distilling ends."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from besa.quantization import Grid, Unrounded

STEP, ZERO = "besa.step", "besa.zero"  # ends of names that no parameter has


def encode(tensors: Mapping[str, Tensor], weights: Mapping[str, Unrounded]) -> dict[str, Tensor]:
    """The tensors of a block with the grids of its linears.

    Args:
        tensors: of the block before its rounding, by any name.
        weights: by name of the linear in the model.
    """
    grids = {
        f"{name}.{end}": tensor.cpu()
        for name, weight in weights.items()
        for end, tensor in ((STEP, weight.grid.step_OG), (ZERO, weight.grid.zero_OG))
    }
    return {**tensors, **grids}


def decode(tensors: Mapping[str, Tensor], bits: int) -> tuple[dict[str, Tensor], dict[str, Grid]]:
    """The tensors of a block and the grids by name of the linear, from what `encode` returned, to the bit.

    Args:
        tensors: of the block.
        bits: of a code.
    """
    names = [name.removesuffix(f".{STEP}") for name in tensors if name.endswith(f".{STEP}")]
    grids = {name: Grid(tensors[f"{name}.{STEP}"], tensors[f"{name}.{ZERO}"], bits) for name in names}
    return {name: tensor for name, tensor in tensors.items() if not name.endswith((STEP, ZERO))}, grids
