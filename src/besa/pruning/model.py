"""Run a whole recipe: prepare, prune block after block, then distil the whole model."""

from __future__ import annotations

from besa.pruning.distilling import distill, distilled_before
from besa.pruning.loop import prune_units
from besa.pruning.preparing import prepare
from besa.pruning.run import Run
from besa.record import BlockRecord, DistillingRecord


def prune_model(run: Run) -> tuple[list[BlockRecord], DistillingRecord | None]:
    """Prune a decoder by the recipe of a run; errors as of `prepare`, `prune_units` and `distill`.

    Returns:
        A record of each block, and one of distilling if the recipe distils.
    """
    before = distilled_before(run.journal)
    distilling = run.recipe.distill.moves_weights and before is None
    pruned = prune_units(run, prepare(run), run.training_set if distilling else None)
    return pruned.records, distill(run, pruned) if distilling else before
