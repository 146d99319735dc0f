"""How many forward passes over the calibration set a recipe takes, and the recipe for a given number of passes.

A backward pass counts as two forward passes, or as one if its gradients go only to activations. Solving for weights
between passes (`cg`, `admm` and `obs`) does not count.
"""

from __future__ import annotations

from besa.errors import BesaError
from besa.methods.allocation import first_tokens
from besa.methods.recipe import Recipe
from besa.pruning.paths import dense_share
from besa.settings import LARGEST


def forward_passes(recipe: Recipe, samples: int, seqlen: int) -> float:
    """Forward passes over the calibration set, through all blocks, that a recipe takes at most.

    Args:
        recipe: the method.
        samples: calibration sequences.
        seqlen: tokens of each.
    """
    share, tokens = dense_share(recipe, seqlen)
    dense = -(-samples // share) * tokens / (samples * seqlen)
    passes = dense + 2  # the dense path, statistics, the pruned path
    parts = 2 if recipe.granularity == "attn-mlp" else 1  # attention has its own teacher and its own steps
    if parts == 2:
        passes += 1 if recipe.teacher == "pruned" else dense
    if recipe.descent is not None:
        learned = recipe.descent.steps * first_tokens(seqlen, recipe.descent.crop)
        passes += 3 * parts * learned / (samples * seqlen)
    if recipe.allocation.probes_every is not None:
        passes += 2 / recipe.allocation.probes_every
    return passes + recipe.targets.passes + recipe.finetune.passes


def spending(recipe: Recipe, passes: float, samples: int, seqlen: int) -> Recipe:
    """The recipe with as many epochs of fine-tuning as the given forward passes allow.

    Args:
        recipe: must fine-tune.
        passes: forward passes, at most.
        samples: calibration sequences.
        seqlen: tokens of each.

    Raises:
        BesaError: the recipe does not fine-tune, or the passes are too few for one epoch or too many to count.
    """
    if not recipe.finetune.moves_weights:
        raise BesaError(
            f"Recipe {recipe.name} does not fine-tune, so it has no use for more passes: choose the recipe best, or "
            "set finetune.method=adam."
        )
    epoch, least = recipe.finetune.epoch_passes, forward_passes(_with_epochs(recipe, 1), samples, seqlen)
    if not passes >= least:
        raise BesaError(
            f"{passes:g} passes are too few: {recipe.name} takes {least:.1f} with one epoch of fine-tuning."
        )
    if (passes - least) / epoch >= LARGEST:
        raise BesaError(f"{passes:g} passes are more than can be counted: ask for less.")
    return _with_epochs(recipe, 1 + int((passes - least) / epoch))


def _with_epochs(recipe: Recipe, epochs: int) -> Recipe:
    return recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update={"epochs": epochs})})
