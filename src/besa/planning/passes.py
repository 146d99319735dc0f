"""How many forward passes of the calibration set a recipe takes, and how to spend so many.

A backward pass counts as two forward passes, or as one where its gradients go to activations and not to weights.
Solving for weights, which `cg`, `admm` and `obs` do between passes, is not counted.
"""

from __future__ import annotations

from besa.allocation import first_tokens
from besa.errors import BesaError
from besa.finetuning import MaskedAdam
from besa.pruning.paths import dense_share
from besa.recipe import Recipe
from besa.settings import LARGEST
from besa.targets import LossSensitivity, Owl, Search


def forward_passes(recipe: Recipe, samples: int, seqlen: int) -> float:
    """Forward passes of the calibration set, through all blocks, that pruning by a recipe takes at most.

    Args:
        recipe: the method.
        samples: calibration sequences.
        seqlen: tokens of each.
    """
    share, tokens = dense_share(recipe, seqlen)
    dense = -(-samples // share) * tokens / (samples * seqlen)
    passes = dense + 2  # the dense path, statistics, the pruned path
    halves = 2 if recipe.granularity == "attn-mlp" else 1  # attention has a teacher of its own, and steps of its own
    if halves == 2:
        passes += 1 if recipe.teacher == "pruned" else dense
    if recipe.descent is not None:
        seen = recipe.descent.steps * first_tokens(seqlen, recipe.descent.crop)
        passes += 3 * halves * seen / (samples * seqlen)
    if isinstance(recipe.targets, Owl):
        passes += 1 / recipe.targets.every
    if isinstance(recipe.targets, LossSensitivity | Search):
        passes += 3 / recipe.targets.every
    if isinstance(recipe.targets, Search):
        passes += (1 + len(recipe.targets.strengths)) / recipe.targets.every
    if recipe.probed is not None:
        passes += 2 / recipe.probed
    if isinstance(recipe.finetune, MaskedAdam):
        passes += recipe.finetune.epochs * _epoch(recipe.finetune) + 1 / recipe.finetune.held_out
    return passes


def spending(recipe: Recipe, passes: float, samples: int, seqlen: int) -> Recipe:
    """The recipe with as many epochs of fine-tuning as a number of forward passes leaves room for.

    Args:
        recipe: one that fine-tunes.
        passes: to take at most.
        samples: calibration sequences.
        seqlen: tokens of each.

    Raises:
        BesaError: the recipe does not fine-tune, or the passes do not suffice for one epoch, or for too many.
    """
    if not isinstance(recipe.finetune, MaskedAdam):
        raise BesaError(
            f"Recipe {recipe.name} does not fine-tune, so it has nothing to spend passes on: take best, or set "
            "finetune.method=adam."
        )
    epoch = _epoch(recipe.finetune)
    least = forward_passes(recipe, samples, seqlen) - (recipe.finetune.epochs - 1) * epoch
    if not passes >= least:
        raise BesaError(
            f"{passes:g} passes are too few: {recipe.name} takes {least:.1f} with one epoch of fine-tuning."
        )
    if (passes - least) / epoch >= LARGEST:
        raise BesaError(f"{passes:g} passes are more than can be counted: ask for less.")
    finetune = recipe.finetune.model_copy(update={"epochs": 1 + int((passes - least) / epoch)})
    return recipe.model_copy(update={"finetune": finetune})


def _epoch(finetune: MaskedAdam) -> float:
    """Passes of an epoch, with the look at what is held out."""
    held = 1 / finetune.held_out
    return 3 * (1 - held) + held
