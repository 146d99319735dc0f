"""What a recipe needs to know of the dense model before anything is pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from besa.data.calibration import Calibration
from besa.methods.fisher import loss_gradients
from besa.methods.recipe import Recipe
from besa.methods.survey import Survey
from besa.methods.targets.budgets import shared_names
from besa.models.streaming import Decoder
from besa.progress import Progress
from besa.pruning.paths import Resources
from besa.storage.journal import Journal
from besa.system import ranks


@dataclass(frozen=True)
class Measured:
    """What was measured on the dense model.

    Attributes:
        targets: of each block; None if all have the same sparsity.
        gradients: squared gradients of the loss at the rows, by full name; empty if the recipe needs none.
    """

    targets: list[float] | None = None
    gradients: Mapping[str, Tensor] = field(default_factory=dict)


def measure(
    decoder: Decoder,
    recipe: Recipe,
    calibration: Calibration,
    seed: int,
    resources: Resources,
    journal: Journal | None,
    progress: Progress,
) -> Measured:
    """Measure what the recipe needs. The journal keeps it."""
    measuring, every = recipe.targeting.measuring, recipe.allocation.loss_every(calibration.samples)
    names, _ = shared_names(decoder.blocks, recipe)
    survey = Survey(
        decoder,
        calibration,
        names,
        recipe.sparsity,
        resources.batch,
        resources.device,
        resources.room,
        seed,
        [recipe.allocation.structures(block, own) for block, own in zip(decoder.blocks, names, strict=True)],
        progress,
    )
    targets, gradients = None, {}
    if every is not None:
        gradients = ranks.tensors_from_first((journal.gradients if journal is not None else None) or {})
        if not gradients:
            gradients = loss_gradients(survey, every).squares
            if journal is not None:
                journal.keep_gradients(gradients)
    if measuring is not None and any(survey.sizes):
        measured = ranks.from_first(journal.targets if journal is not None else None)
        if measured is None:
            measured = measuring.measure(survey)
            if journal is not None:
                journal.keep_targets(measured)
        targets = measuring.targets(measured, survey.sizes, recipe.sparsity)
    return Measured(targets, gradients)
