"""The two paths through the model, pruned and dense: what is kept of them, and how a run is computed.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from besa.data.calibration import Calibration
from besa.methods.allocation import first_tokens
from besa.methods.recipe import Recipe
from besa.models.activations import HiddenStates, allocate
from besa.models.blocks import capture_inputs
from besa.models.streaming import Decoder

CPU = torch.device("cpu")
# The error against the dense path is measured on one sequence in so many, and on this share of its tokens from the
# beginning: the same for every method, as the dense path need not go on with more for its sake.
ERROR_SHARE = 16
ERROR_TOKENS = 0.5


@dataclass(frozen=True)
class Resources:
    """How a run is computed; none of it changes what is learned beyond the order of floating-point sums.

    Attributes:
        batch: sequences in a forward pass.
        device: where blocks are computed.
        activation_budget: bytes of hidden states kept in memory; more go into a file.
        folder: where that file is made; by default where temporary files go.
        codes: keep quantised weights as codes; else as the numbers they stand for.
    """

    batch: int = 4
    device: torch.device = CPU
    activation_budget: int = 1 << 62
    folder: Path | None = None
    codes: bool = True


PLAIN = Resources()


def first_inputs(
    decoder: Decoder, recipe: Recipe, calibration: Calibration, resources: Resources
) -> tuple[HiddenStates, HiddenStates]:
    """Inputs of the first block: all of them for the pruned path, as much as the recipe needs for the dense path."""
    samples, seqlen = calibration.tokens_NT.shape
    share, length = dense_share(recipe, seqlen)
    lengths = {length, first_tokens(seqlen, recipe.descent.crop if recipe.descent else 1.0)}
    with decoder.embeddings():
        parts = capture_inputs(decoder.model, decoder.blocks, calibration.tokens_NT, resources.batch, lengths)
        for start, part_NTC in zip(range(0, samples, resources.batch), parts, strict=True):
            if start == 0:
                width, room = part_NTC.shape[-1], resources.activation_budget // 2
                pruned_NTC = allocate((samples, seqlen, width), part_NTC.dtype, room, resources.folder)
                dense_NTC = allocate((-(-samples // share), length, width), part_NTC.dtype, room, resources.folder)
            pruned_NTC[start : start + len(part_NTC)] = part_NTC
    for place in range(len(dense_NTC)):
        dense_NTC[place : place + 1] = pruned_NTC[place * share : place * share + 1][:, :length]
    return pruned_NTC, dense_NTC


def dense_share(recipe: Recipe, seqlen: int) -> tuple[int, int]:
    """What the dense path is needed for: one sequence in how many, and how many tokens of it from its beginning."""
    if recipe.finetune.moves_weights:
        return 1, seqlen
    if recipe.descent is None or recipe.teacher != "dense":
        return ERROR_SHARE, first_tokens(seqlen, ERROR_TOKENS)
    return 1, first_tokens(seqlen, max(ERROR_TOKENS, recipe.descent.crop))
