"""Whether a recipe can be used on a model at all: what its names and shapes tell, before anything else is done."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from besa.errors import BesaError
from besa.methods.recipe import Recipe
from besa.methods.targets.budgets import budgets
from besa.models.blocks import Block
from besa.planning.whole import check_fits
from besa.pruning import quantizing
from besa.pruning.dropping import smaller


def check_suits(
    model: PreTrainedModel, blocks: list[Block], recipe: Recipe, seqlen: int, device: torch.device, *, as_codes: bool
) -> None:
    """Check before any text is fetched or written, and before other runs, that a recipe can be used on a model.

    Args:
        model: in the dtype of the run; its weights may be on the meta device.
        blocks: of the model.
        recipe: the method.
        seqlen: tokens of a calibration sequence.
        device: that computes.
        as_codes: whether the checkpoint will have codes, if the recipe quantises.

    Raises:
        BesaError: a pattern matches no name, or columns are no whole number of groups; the model lacks the experts,
            structures or head that the recipe needs; its weights cannot become codes; or the memory is too small to
            distil.
    """
    predicts = bool(recipe.losses_every(1)) or recipe.distill.moves_weights
    if predicts and model.get_output_embeddings() is None:
        raise BesaError(
            f"Recipe {recipe.name} needs predictions, and {type(model).__name__} has no head that makes them: load the "
            "model with AutoModelForCausalLM, or take a recipe that needs none, such as wanda."
        )
    left = smaller(model, blocks, recipe)
    if left is not None:
        model, blocks = left.model, left.blocks
    budgets(blocks, recipe)
    quantizing.check(recipe, model, blocks, as_codes=as_codes)
    check_fits(model, blocks, recipe, seqlen, device)
