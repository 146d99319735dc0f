"""The pruned and the dense path through the model: which hidden states they keep, and how a run is computed.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch

from besa.data.calibration import Calibration
from besa.methods.allocation import first_tokens
from besa.methods.recipe import Recipe
from besa.models.activations import HiddenStates, Room
from besa.models.ends import embedded
from besa.models.streaming import Decoder
from besa.system.devices import CPU
from besa.system.ranks import Share

# The error against the dense path is measured on one sequence in ERROR_SHARE, and on this share of its tokens from the
# beginning. Every method has the same, so that measuring never makes the dense path longer.
ERROR_SHARE = 16
ERROR_TOKENS = 0.5


@dataclass(frozen=True)
class Resources:
    """How a run is computed. The result changes only by the order of floating-point sums.

    Attributes:
        batch: sequences in a forward pass.
        device: where blocks are computed.
        room: for hidden states.
        codes: keep quantised weights as codes; else as the numbers they stand for.
    """

    batch: int = 4
    device: torch.device = CPU
    room: Room = field(default_factory=lambda: Room(budget=sys.maxsize))
    codes: bool = True


PLAIN = Resources()


def first_inputs(
    decoder: Decoder, recipe: Recipe, calibration: Calibration, resources: Resources, share: Share
) -> tuple[HiddenStates, HiddenStates]:
    """Inputs of the first block, for the sequences of this rank.

    Returns:
        Those of the pruned path, and as many as the recipe needs of the dense path.
    """
    every, length = dense_share(recipe, calibration.seqlen)
    lengths = {length, recipe.descent.tokens(calibration.seqlen) if recipe.descent else calibration.seqlen}
    with decoder.embeddings(resources.device):
        pruned_NTC = embedded(
            decoder.model, decoder.blocks, calibration.tokens_NT, resources.batch, resources.room, share, lengths
        )
    kept = share.own(share.every(every))
    dense_NTC = resources.room.empty((len(kept), length, pruned_NTC.shape[-1]), pruned_NTC.dtype)
    for place, own in enumerate(kept):
        dense_NTC[place : place + 1] = pruned_NTC[own : own + 1][:, :length]
    return pruned_NTC, dense_NTC


def dense_share(recipe: Recipe, seqlen: int) -> tuple[int, int]:
    """The part of the calibration set that the dense path needs.

    Returns:
        One sequence in how many, and how many tokens of it from its beginning.
    """
    if recipe.finetune.moves_weights:
        return 1, seqlen
    if recipe.descent is None or recipe.teacher != "dense":
        return ERROR_SHARE, first_tokens(seqlen, ERROR_TOKENS)
    return 1, max(first_tokens(seqlen, ERROR_TOKENS), recipe.descent.tokens(seqlen))
