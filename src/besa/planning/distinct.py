"""One unit of each shape, from which a plan is computed; most decoders have only one shape."""

from __future__ import annotations

from dataclasses import dataclass

from besa.counting.budget import Budget
from besa.models.units import Unit
from besa.planning.outline import Outline
from besa.planning.shapes import learn_arguments, shared_inputs


@dataclass(frozen=True)
class Distinct:
    """A unit that stands for all of its shape.

    Attributes:
        unit: on the meta device.
        budgets: of the unit.
        inputs: names of its matrices, grouped by the input that they share.
    """

    unit: Unit
    budgets: list[Budget]
    inputs: list[tuple[str, ...]]


def distinct_units(run: Outline) -> list[Distinct]:
    """One unit of each shape; after it, all blocks know their call arguments.

    Raises:
        BesaError: as of `learn_arguments`.
    """
    crop = run.recipe.descent.tokens(run.seqlen) if run.recipe.descent else run.seqlen
    learn_arguments(run.model, run.blocks, {(run.batch, run.seqlen), (1, run.seqlen), (1, crop)})
    by_shapes = {
        tuple((p.rows, p.columns) for p in unit.prunables.values()): (unit, unit_budgets)
        for unit, unit_budgets in reversed(list(zip(run.units, run.budgets_of_units, strict=True)))
    }
    return [
        Distinct(unit, unit_budgets, shared_inputs(unit, run.model, run.seqlen))
        for unit, unit_budgets in by_shapes.values()
    ]
