"""The stage after the blocks: the whole pruned model learns to predict what the dense model predicts."""

from __future__ import annotations

from contextlib import ExitStack

from besa.data.calibration import Calibration
from besa.methods.distilling import NoSnapshots, Pupil
from besa.methods.recipe import Recipe
from besa.models.activations import HiddenStates
from besa.models.blocks import embedded
from besa.models.streaming import Decoder
from besa.models.whole import Whole
from besa.progress import Progress
from besa.pruning.paths import Resources
from besa.record import BlockRecord, DistillingRecord
from besa.system.ranks import Share
from besa.system.stopwatch import Stopwatch


def distill(
    decoder: Decoder,
    recipe: Recipe,
    calibration: Calibration,
    records: list[BlockRecord],
    targets_NTC: HiddenStates,
    *,
    share: Share,
    seed: int,
    resources: Resources,
    progress: Progress,
) -> DistillingRecord:
    """Distil a model whose blocks are pruned, with all blocks on the device at once.

    Args:
        decoder: its blocks are pruned.
        recipe: the method.
        calibration: token ids (N, T).
        records: of the blocks.
        targets_NTC: outputs of the last block on the dense path, for all tokens of the share.
        share: the sequences of this rank.
        seed: of the order of sequences.
        resources: how to compute.
        progress: is called with (steps done, steps, state) after every step.
    """
    watch, blocks, device = Stopwatch(resources.device), decoder.blocks, resources.device
    with ExitStack() as stack:
        with watch("load"):
            stack.enter_context(decoder.outside_blocks(device))
            inputs_NTC = embedded(decoder.model, blocks, calibration.tokens_NT, 1, resources.room, share)
            for block in blocks:
                stack.enter_context(decoder.opened(block, device))
        pupil = Pupil(
            Whole(decoder.model, blocks),
            [linear.name for record in records for linear in record.linears],
            calibration.tokens_NT[share.places],
            inputs_NTC,
            targets_NTC,
            share,
            seed,
        )
        with watch("distill"):
            distilled = recipe.distill.distill(pupil, NoSnapshots(), progress)
    return DistillingRecord(
        losses=distilled.losses, seconds=sum(watch.seconds.values()), phases=watch.seconds, sent=watch.sent
    )
