"""The input and output of fine-tuning: a pruned block with its targets, and weights that come closer to them.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, O rows, I columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from besa.models.activations import HiddenStates
from besa.models.blocks import Block
from besa.models.units import Unit
from besa.system.ranks import Share


@dataclass(frozen=True)
class FinetuningProblem:
    """A pruned block to fine-tune, and what it learns from.

    Attributes:
        block: the block or unit, with its pruned weights.
        names: full names of the matrices that may change.
        inputs_NTC: inputs on the pruned path.
        targets_NTC: outputs of the dense path, for the same tokens.
        share: the sequences of inputs and targets, which are those of this rank.
        seed: of the order of sequences.
    """

    block: Block | Unit
    names: list[str]
    inputs_NTC: HiddenStates
    targets_NTC: HiddenStates
    share: Share
    seed: int


@dataclass(frozen=True)
class Finetuned:
    """The result of fine-tuning.

    Attributes:
        weights: (O, I) by full name, in the dtype of the model.
        losses: on held-out sequences, before the first epoch and after every epoch.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
