"""The outline of a run: its settings, and what follows from them directly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel

from besa.counting.budget import Budget
from besa.methods.recipe import Recipe
from besa.methods.targets.budgets import budgets
from besa.models import sizes
from besa.models.blocks import Block
from besa.models.mixtures import Fewer
from besa.models.units import Unit, units
from besa.planning.passes import most, shares_of
from besa.system.ranks import Share


@dataclass(frozen=True)
class Outline:
    """A run on a machine, described by its settings and its model's configuration, without weights.

    Attributes:
        name: of the model, as the user gave it.
        model: a skeleton on the meta device, in the dtype of the run, without the experts that are dropped.
        blocks: of the model.
        recipe: the method.
        samples: calibration sequences.
        seqlen: tokens of a calibration sequence.
        batch: sequences in a forward pass.
        device: where blocks would be computed; this machine need not have it.
        activation_budget: as in `Room`; if the device is not here, its memory has no limit by default.
        folder: where the checkpoint would be written.
        dequantized: quantised weights are written as dense numbers, not as codes.
        fewer: the decoder with fewer experts; None if all stay.
        ranks: processes on this machine, one for each device.
        own: share of the sequences that the model writes itself; rank 0 loads it whole for that.
        file: bytes of the .gguf file that the model is loaded from, whole; None for safetensors, which stay on disk.
        document: characters of the longest document among the first of each calibration file.
    """

    name: str
    model: PreTrainedModel
    blocks: list[Block]
    recipe: Recipe
    samples: int
    seqlen: int
    batch: int
    device: torch.device
    activation_budget: int | None
    folder: Path
    dequantized: bool = False
    fewer: Fewer | None = None
    ranks: int = 1
    own: float = 0.0
    file: int | None = None
    document: int = 0

    @property
    def parameters(self) -> int:
        """The number of parameters of the model, without the experts that are dropped."""
        return int(self.model.num_parameters())

    @property
    def weight_bytes(self) -> int:
        """Bytes of these parameters."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    @property
    def dropped(self) -> int:
        """The parameters of the experts that are dropped."""
        return self.fewer.dropped if self.fewer is not None else 0

    @property
    def item(self) -> int:
        """Bytes of a number in the dtype of the run."""
        return int(self.model.dtype.itemsize)

    @property
    def channels(self) -> int:
        """Channels of the residual stream."""
        return sizes.channels(self.model)

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return sizes.vocabulary(self.model)

    @cached_property
    def units(self) -> list[Unit]:
        """The units in their order."""
        return units(self.blocks, self.recipe.granularity)

    @cached_property
    def budgets_of_units(self) -> list[list[Budget]]:
        """The budgets of every unit.

        Raises:
            BesaError: a pattern of the recipe matches nothing.
        """
        return budgets(self.blocks, self.recipe)

    @property
    def budgets(self) -> list[Budget]:
        """All budgets."""
        return [budget for of_unit in self.budgets_of_units for budget in of_unit]

    @cached_property
    def pruned(self) -> set[str]:
        """Full names of the linears that are pruned."""
        return {name for budget in self.budgets for name in budget.names}

    @cached_property
    def shares(self) -> Sequence[Share]:
        """The sequences of each rank."""
        return shares_of(self.samples, self.batch, self.ranks)

    @property
    def sequences(self) -> int:
        """The most sequences that a rank has."""
        return most(self.shares)

    @property
    def routed(self) -> bool:
        """Whether the model has experts."""
        return any(prunable.routed for block in self.blocks for prunable in block.prunables.values())
