"""Whether the choices of a recipe go together: one check for each rule, in the order in which they are told.

Every check raises ValueError, with what to do, if the recipe breaks its rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from besa.methods.recipe import Recipe


def _codes_are_not_tuned(recipe: Recipe) -> None:
    if recipe.quantization.coding is not None and recipe.finetune.moves_weights:
        raise ValueError("quantization does not go with finetune, which would move the codes: set finetune.method=none")


def _codes_of_weights_that_stay(recipe: Recipe) -> None:
    coded, moved = recipe.quantization.coding is not None, recipe.quantization.moved is not None
    if coded and not moved and (recipe.reconstruction.moves_weights or recipe.distill.moves_weights):
        raise ValueError(
            f"quantization.method={recipe.quantization.method} works only if kept weights do not change: set "
            "quantization.method=moved, or reconstruction.method=none and distill.method=none"
        )


def _clipping_learns_with_rates(recipe: Recipe) -> None:
    if recipe.quantization.learns_jointly and recipe.allocation.descent is None:
        raise ValueError(
            "quantization.clipping=joint needs an allocation that learns, and allocation.method="
            f"{recipe.allocation.method} learns nothing: set quantization.clipping=first"
        )


def _importance_measures_errors(recipe: Recipe) -> None:
    if recipe.allocation.compares_errors and recipe.importance.power is None:
        raise ValueError(
            f"allocation.method={recipe.allocation.method} compares output errors, which "
            f"importance.method={recipe.importance.method} does not measure: set importance.method=wanda, or choose "
            "another allocation.method"
        )


def _structures_stay_whole(recipe: Recipe) -> None:
    if recipe.allocation.whole_structures and not recipe.reconstruction.keeps_mask:
        raise ValueError(
            "structured pruning needs a reconstruction that keeps the mask: set reconstruction.method to none or "
            "cg, or reconstruction.mask=fixed"
        )


def _importance_decides(recipe: Recipe) -> None:
    own = _importance_of_reconstruction(recipe)
    if own is not None and recipe.importance.method != own:
        raise ValueError(
            f"importance.method={recipe.importance.method} would decide nothing, as reconstruction.mask=adaptive "
            f"chooses weights by {own}: set importance.method={own}, or reconstruction.mask=fixed"
        )


def _order_decides(recipe: Recipe) -> None:
    if _importance_of_reconstruction(recipe) is not None and recipe.allocation.sorts_linears:
        raise ValueError(
            "allocation.per=linear would decide nothing, as reconstruction.mask=adaptive sorts the weights "
            "itself: set allocation.per=row, or reconstruction.mask=fixed"
        )


def _importance_of_reconstruction(recipe: Recipe) -> str | None:
    """The method of importance by which the reconstruction alone chooses weights; None if the recipe's counts too."""
    allocation = recipe.allocation
    if allocation.compares_errors or allocation.descent is not None:
        return None
    return recipe.reconstruction.own_importance


def _targets_have_weights_to_share(recipe: Recipe) -> None:
    pruned = any([recipe.sparsity, *recipe.sparsity_of.values()])
    if recipe.experts.scoring and recipe.targets.measuring and not pruned:
        raise ValueError(
            "every mixture loses the same number of experts, as configurations have one number for all blocks: "
            f"targets.method={recipe.targets.method} needs a sparsity of the weights that stay; set one, or "
            "targets.method=uniform"
        )


def _sparsity_can_be_reached(recipe: Recipe) -> None:
    only = recipe.allocation.only_sparsity
    if only is not None and {recipe.sparsity, *recipe.sparsity_of.values()} != {only}:
        raise ValueError(
            f"allocation.method={recipe.allocation.method} prunes exactly {only:.4g} of the weights with these "
            f"settings: set sparsity={only!r} and no sparsity_of"
        )


def _even_blocks_have_no_targets(recipe: Recipe) -> None:
    if recipe.allocation.even and recipe.targets.measuring is not None:
        raise ValueError(f"allocation.method={recipe.allocation.method} works only with targets.method=uniform")


def _shapes_have_no_codes(recipe: Recipe) -> None:
    if recipe.allocation.shaped and recipe.quantization.coding is not None:
        raise ValueError(f"allocation.method={recipe.allocation.method} works only with quantization.method=none")


CHECKS: tuple[Callable[[Recipe], None], ...] = (
    _codes_are_not_tuned,
    _codes_of_weights_that_stay,
    _clipping_learns_with_rates,
    _importance_measures_errors,
    _structures_stay_whole,
    _importance_decides,
    _order_decides,
    _targets_have_weights_to_share,
    _sparsity_can_be_reached,
    _even_blocks_have_no_targets,
    _shapes_have_no_codes,
)
