"""Measurements of the dense model that a recipe needs before anything is pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from besa.methods.fisher import loss_gradients
from besa.methods.survey import Survey
from besa.methods.targets.budgets import shared_names
from besa.pruning.run import Run
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


def measure(run: Run) -> Measured:
    """Measure what the recipe needs. The journal keeps it.

    Raises:
        BesaError: gradients are NaN or infinite, or the recipe's targets cannot be measured.
    """
    decoder, recipe, journal = run.decoder, run.recipe, run.journal
    measuring, every = recipe.targeting.measuring, recipe.allocation.loss_every(run.calibration.samples)
    names, _ = shared_names(decoder.blocks, recipe)
    survey = Survey(
        decoder=decoder,
        calibration=run.calibration,
        names=names,
        sparsity=recipe.sparsity,
        batch=run.resources.batch,
        device=run.resources.device,
        room=run.resources.room,
        seed=run.seed,
        structures=[recipe.allocation.structures(block, own) for block, own in zip(decoder.blocks, names, strict=True)],
        progress=run.progress,
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
