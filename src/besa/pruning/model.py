"""All of a recipe: the blocks one after another, then the whole model."""

from __future__ import annotations

from besa.data.calibration import Calibration
from besa.methods.recipe import Recipe
from besa.models.streaming import Decoder
from besa.progress import Progress, silent
from besa.pruning.distilling import distill, distilled_before
from besa.pruning.loop import prune_blocks
from besa.pruning.paths import PLAIN, Resources
from besa.record import BlockRecord, DistillingRecord
from besa.storage.journal import Journal


def prune_model(
    decoder: Decoder,
    recipe: Recipe,
    calibration: Calibration,
    *,
    dense: Decoder | None = None,
    seed: int = 0,
    resources: Resources = PLAIN,
    journal: Journal | None = None,
    progress: Progress = silent,
) -> tuple[list[BlockRecord], DistillingRecord | None]:
    """Prune a decoder by `recipe`; arguments and errors as of `prune_blocks`.

    Returns:
        A record of each block, and one of distilling if the recipe distils.
    """
    before = distilled_before(journal)
    distilling = recipe.distill.moves_weights and before is None
    pruned = prune_blocks(
        decoder,
        recipe,
        calibration,
        dense=dense,
        seed=seed,
        resources=resources,
        journal=journal,
        progress=progress,
        to_the_end=distilling,
    )
    if not distilling:
        return pruned.records, before
    assert pruned.dense_NTC is not None
    record = distill(
        decoder,
        recipe,
        calibration,
        pruned.records,
        pruned.dense_NTC,
        pruned.grids,
        share=pruned.share,
        seed=seed,
        resources=resources,
        journal=journal,
        progress=progress,
    )
    return pruned.records, record
