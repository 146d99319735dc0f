"""How many forward passes over the calibration set a recipe takes, and the recipe for a given number of passes.

A backward pass counts as two forward passes, or as one if its gradients go only to activations. Blocks that run again
for a backward pass count again. Solving for weights between passes (`cg`, `admm` and `obs`) does not count.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from besa.errors import BesaError
from besa.methods.recipe import Recipe
from besa.pruning.paths import dense_share
from besa.settings import LARGEST
from besa.system.ranks import Share, together

WALK = "walk"  # dense path, statistics and pruned path, among the stages of a recipe
ROUNDING = 1e-9  # of sums of passes, in epochs


def shares_of(samples: int, batch: int, ranks: int) -> list[Share]:
    """The sequences of each rank; arguments as of `forward_passes`."""
    shares = []
    for number in range(ranks):
        with together(number, ranks):
            shares.append(Share.of(samples, batch))
    return shares


def most(shares: Sequence[Share], every: int = 1) -> int:
    """Largest number of sequences of a rank; with `every`, only those at its multiples count."""
    return max(len(share.every(every)) for share in shares)


def forward_passes(
    recipe: Recipe, samples: int, seqlen: int, batch: int = 1, ranks: int = 1, routed: bool = False, head: float = 0.0
) -> float:
    """Forward passes over the calibration set, through all blocks, that a recipe takes at most.

    With several ranks, these are the passes of the rank with the most sequences, over its own sequences. Where a rank
    waits for one that has more sequences to measure, or more in a learning step, the passes of the other count.

    Args:
        recipe: the method.
        samples: calibration sequences.
        seqlen: tokens of each.
        batch: sequences in a forward pass.
        ranks: that share them.
        routed: whether the model has experts.
        head: cost of the model's head (`models.whole.head_share`), which counts where the whole model learns.
    """
    return sum(passes_by_stage(recipe, samples, seqlen, batch, ranks, routed, head).values())


def passes_by_stage(
    recipe: Recipe, samples: int, seqlen: int, batch: int = 1, ranks: int = 1, routed: bool = False, head: float = 0.0
) -> dict[str, float]:
    """Forward passes by stage of the recipe; `WALK` are those of every recipe. Arguments as of `forward_passes`."""
    recipe = recipe.settled(ranks, samples, {})
    shares = shares_of(samples, batch, ranks)
    own = most(shares)
    share, tokens = dense_share(recipe, seqlen)
    dense = most(shares, share) * tokens / (own * seqlen)
    observed = most(shares, recipe.statistics_every(routed=routed)) / own
    walk = dense + observed + 1  # the dense path, statistics, the pruned path
    if recipe.teacher == "pruned":
        walk += 1  # its outputs
    parts = 2 if recipe.granularity == "attn-mlp" else 1  # attention has its own teacher and its own steps
    if parts == 2:
        walk += 1 if recipe.teacher == "pruned" else dense
    passes = defaultdict(float, {WALK: walk})
    if recipe.experts.scoring is not None:
        passes["experts"] = 2  # through the dense model; experts compute what they add once more
    if recipe.descent is not None:
        steps = recipe.descent.steps * -(-min(recipe.descent.sequences, samples) // ranks)
        learning = 3 * parts * steps * recipe.descent.tokens(seqlen) / (own * seqlen)
        passes["allocation" if recipe.allocation.descent is not None else "quantization"] += learning
    decides = "allocation" if recipe.allocation.targeting is not None else "targets"  # how much each block loses
    for every in recipe.losses_every(samples):  # a forward pass, then a forward and a backward pass to activations
        of_targets = every == recipe.targeting.loss_every(samples)
        gradients = 3 * most(shares_of(-(-samples // every), batch, ranks)) / own
        passes[decides if of_targets else "allocation"] += gradients

    def waiting(step: int) -> float:
        """What is added to the passes of learning; 0 if the sequences of a step are divided as the set is."""
        return samples / own * -(-step // ranks) / step - 1

    passes["finetune"] += recipe.finetune.passes
    passes["finetune"] += waiting(recipe.finetune.sequences) * recipe.finetune.learned_passes
    passes["distill"] += recipe.distill.passes(head)
    passes["distill"] += waiting(recipe.distill.sequences) * recipe.distill.learned_passes(head)
    if recipe.targeting.measuring is not None:
        measured = -(-samples // recipe.targeting.measuring.every(samples))
        passes[decides] += recipe.targeting.forwards * most(shares_of(measured, batch, ranks)) / own
    return passes


def states_measured(recipe: Recipe, samples: int, blocks: int, batch: int = 1, ranks: int = 1) -> int:
    """Sequences of hidden states that a rank keeps at once, at most, while the dense model is measured.

    Args:
        recipe: the method.
        samples: calibration sequences.
        blocks: of the model.
        batch: sequences in a forward pass.
        ranks: that share them.
    """
    paths = dict.fromkeys(recipe.losses_every(samples), blocks + 1)  # the inputs of all blocks, and the gradients
    if recipe.targeting.measuring is not None:
        every = recipe.targeting.measuring.every(samples)
        paths[every] = max(paths.get(every, 0), recipe.targeting.paths)
    kept = [most(shares_of(-(-samples // every), batch, ranks)) * number for every, number in paths.items()]
    return max(kept, default=0)


def spending(recipe: Recipe, passes: float, samples: int, seqlen: int, head: float = 0.0) -> Recipe:
    """The recipe with as many epochs of learning as the given forward passes allow.

    Args:
        recipe: must fine-tune or distil.
        passes: forward passes, at most.
        samples: calibration sequences.
        seqlen: tokens of each.
        head: as of `forward_passes`.

    Raises:
        BesaError: the recipe does neither, or the passes are not positive, too few for one epoch or too many to count.
    """
    if not (recipe.finetune.moves_weights or recipe.distill.moves_weights):
        raise BesaError(
            f"Recipe {recipe.name} does not fine-tune or distil, so it has no use for more passes: choose the recipe "
            "best, or set finetune.method=adam."
        )
    if not passes > 0:
        raise BesaError(f"{passes:g} passes are nothing to spend: give a positive number.")

    def taken(epochs: int) -> float:
        return forward_passes(_with_epochs(recipe, epochs), samples, seqlen, head=head)

    least = taken(1)
    epoch = taken(2) - least
    if not passes >= least:
        part = "distilling" if recipe.distill.moves_weights else "fine-tuning"
        raise BesaError(f"{passes:g} passes are too few: {recipe.name} takes {least:.1f} with one epoch of {part}.")
    if (passes - least) / epoch >= LARGEST:
        raise BesaError(f"{passes:g} passes are more than can be counted: ask for less.")
    return _with_epochs(recipe, 1 + int((passes - least) / epoch + ROUNDING))


def within(recipe: Recipe, minutes: float) -> Recipe:
    """The recipe, set to distil for as many epochs as fit into a run of this many minutes.

    Raises:
        BesaError: the recipe does not distil, or the minutes are not positive.
    """
    if not recipe.distill.moves_weights:
        raise BesaError(
            f"Recipe {recipe.name} does not distil, so it has no use for more minutes: choose the recipe best, or set "
            "distill.method=kl."
        )
    if not 0 < minutes < math.inf:
        raise BesaError(f"{minutes:g} minutes are no time to spend: give a positive number.")
    return recipe.model_copy(update={"distill": recipe.distill.within(minutes)})


def _with_epochs(recipe: Recipe, epochs: int) -> Recipe:
    """The recipe with so many epochs of distilling, or of fine-tuning if it does not distil."""
    if recipe.distill.moves_weights:
        return recipe.model_copy(update={"distill": recipe.distill.with_epochs(epochs)})
    return recipe.model_copy(update={"finetune": recipe.finetune.with_epochs(epochs)})
