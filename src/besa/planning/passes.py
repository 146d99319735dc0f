"""How many forward passes over the calibration set a recipe takes, and the recipe for a given number of passes.

A backward pass counts as two forward passes, or as one if its gradients go only to activations. Solving for weights
between passes (`cg`, `admm` and `obs`) does not count.
"""

from __future__ import annotations

from collections.abc import Sequence

from besa.errors import BesaError
from besa.methods.allocation import first_tokens
from besa.methods.recipe import Recipe
from besa.pruning.paths import dense_share
from besa.settings import LARGEST
from besa.system.ranks import Share, together


def shares_of(samples: int, batch: int, ranks: int) -> list[Share]:
    """The sequences of each rank; arguments as of `forward_passes`."""
    shares = []
    for number in range(ranks):
        with together(number, ranks):
            shares.append(Share.of(samples, batch))
    return shares


def most(shares: Sequence[Share], every: int = 1) -> int:
    """The most sequences that a rank has, or of those at multiples of `every`."""
    return max(len(share.every(every)) for share in shares)


def forward_passes(
    recipe: Recipe, samples: int, seqlen: int, batch: int = 1, ranks: int = 1, routed: bool = False
) -> float:
    """Forward passes over the calibration set, through all blocks, that a recipe takes at most.

    Of several ranks, those of the rank with the most sequences, over its own. Where a rank waits for one that has more
    of the sequences to measure, or of those of a learning step, the passes of the other count.

    Args:
        recipe: the method.
        samples: calibration sequences.
        seqlen: tokens of each.
        batch: sequences in a forward pass.
        ranks: that share them.
        routed: whether the model has experts.
    """
    shares = shares_of(samples, batch, ranks)
    own = most(shares)
    every, tokens = dense_share(recipe, seqlen)
    dense = most(shares, every) * tokens / (own * seqlen)
    observed = most(shares, recipe.statistics_every(routed=routed)) / own
    passes = dense + observed + 1  # the dense path, statistics, the pruned path
    parts = 2 if recipe.granularity == "attn-mlp" else 1  # attention has its own teacher and its own steps
    if parts == 2:
        passes += 1 if recipe.teacher == "pruned" else dense
    if recipe.descent is not None:
        steps = recipe.descent.steps * -(-min(recipe.descent.sequences, samples) // ranks)
        passes += 3 * parts * steps * first_tokens(seqlen, recipe.descent.crop) / (own * seqlen)
    if recipe.allocation.probes_every is not None:
        passes += 2 / recipe.allocation.probes_every
    step = recipe.finetune.sequences
    waiting = samples / own * -(-step // ranks) / step - 1  # 0 if the steps are divided as the set is
    passes += recipe.finetune.passes + waiting * recipe.finetune.learned_passes
    if recipe.targets.measuring is not None:
        measured = -(-samples // recipe.targets.measuring.every)
        passes += recipe.targets.passes * most(shares_of(measured, batch, ranks)) / measured * samples / own
    return passes


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
