"""The input and output of distilling: a pruned model with what it learns from, and how its training went.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from besa.methods.distilling.training_set import TrainingSet
from besa.models.activations import HiddenStates
from besa.models.whole import Whole
from besa.quantization import Grid
from besa.system.ranks import Share


@dataclass(frozen=True)
class Student:
    """A pruned model that learns, and what it learns from.

    Attributes:
        whole: the pruned model.
        linears: full names of the pruned linears, whose kept weights may change.
        tokens_NT: of the sequences of this rank.
        inputs_NTC: of the first block, for the same sequences.
        targets_NTC: outputs of the last block of the dense model.
        training_set: all sequences, of this rank and others.
        share: those of this rank.
        seed: of the order of sequences.
        seconds: that the run has taken so far.
        head: cost of the model's head, as a share of a forward pass through all blocks.
        grids: by full name, of linears that the model has unrounded and that predict as rounded.
    """

    whole: Whole
    linears: list[str]
    tokens_NT: Tensor
    inputs_NTC: HiddenStates
    targets_NTC: HiddenStates
    training_set: TrainingSet
    share: Share
    seed: int
    seconds: float
    head: float
    grids: Mapping[str, Grid] = field(default_factory=dict)


@dataclass(frozen=True)
class Distilled:
    """The result of distilling.

    Attributes:
        epochs: that the step sizes were laid out for; those of each stage.
        losses: on held-out sequences, before the first epoch and after every epoch.
        helped: whether the model has changed.
        changed: full names of the norms and biases that have changed.
    """

    epochs: int = 0
    losses: list[float] = field(default_factory=list)
    helped: bool = False
    changed: list[str] = field(default_factory=list)
