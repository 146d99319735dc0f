"""What an argument stands for: a recipe by its name, and the batch where none is given."""

from __future__ import annotations

from pathlib import Path

import torch

from besa.errors import BesaError
from besa.methods.recipe import Recipe
from besa.system import ranks

BATCH_TOKENS = 2048  # default tokens in a forward pass
ACCELERATOR_BATCH_TOKENS = 8192  # the same on any other device than the CPU, which needs more to be busy


def chosen(recipe: Recipe | str | Path, sparsity: float | None) -> Recipe:
    """The recipe of an argument, at another sparsity if one is given."""
    if not isinstance(recipe, Recipe):
        return Recipe.load(recipe, sparsity)
    return recipe if sparsity is None else recipe.at(sparsity)


def check_coded(dequantized: bool, recipe: Recipe) -> None:
    """Check that `dequantized` has something to change.

    Raises:
        BesaError: the recipe does not quantise.
    """
    if dequantized and recipe.quantization.coding is None:
        raise BesaError("--dequantized is not used: choose a recipe that quantises, or leave it out.")


def default_batch(samples: int, seqlen: int, device: torch.device) -> int:
    """Default number of sequences in a forward pass, which keeps every device busy."""
    busy = (BATCH_TOKENS if device.type == "cpu" else ACCELERATOR_BATCH_TOKENS) // seqlen
    return max(1, min(busy, -(-samples // ranks.count())))
