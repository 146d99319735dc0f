"""The stage after the blocks: the whole pruned model learns to predict what the dense model predicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from besa.data.calibration import Calibration
from besa.methods.distilling import Pupil
from besa.methods.recipe import Recipe
from besa.models.activations import HiddenStates
from besa.models.blocks import embedded
from besa.models.streaming import Decoder
from besa.models.whole import Whole, head_share
from besa.progress import Progress
from besa.pruning.coded import in_files, round_block
from besa.pruning.paths import Resources
from besa.quantization import Grid, Quantized
from besa.record import BlockRecord, DistillingRecord
from besa.storage.formats import unrounded
from besa.storage.journal import Journal
from besa.storage.snapshots import Snapshots
from besa.system import ranks
from besa.system.ranks import Share
from besa.system.stopwatch import Stopwatch


def distilled_before(journal: Journal | None) -> DistillingRecord | None:
    """The record of a distilling that an interrupted run had finished; the journal is that of rank 0."""
    record = journal.distilled if journal is not None else None
    kept: Any = ranks.from_first(record.model_dump(mode="json") if record is not None else None)
    return DistillingRecord.model_validate(kept) if kept is not None else None


def distill(
    decoder: Decoder,
    recipe: Recipe,
    calibration: Calibration,
    records: list[BlockRecord],
    targets_NTC: HiddenStates,
    grids: Mapping[str, Grid],
    *,
    share: Share,
    seed: int,
    resources: Resources,
    journal: Journal | None,
    progress: Progress,
) -> DistillingRecord:
    """Distil a model whose blocks are pruned, with all blocks on the device at once.

    Args:
        decoder: its blocks are pruned, or the journal has them.
        recipe: the method.
        calibration: token ids (N, T).
        records: of the blocks.
        targets_NTC: outputs of the last block on the dense path, for all tokens of the share.
        grids: by full name, of linears that are rounded from now on.
        share: the sequences of this rank.
        seed: of the order of sequences.
        resources: how to compute.
        journal: has the pruned blocks; states and the result are written to it. Only rank 0 has one.
        progress: is called with (steps done, steps, state) after every step.

    Raises:
        BesaError: the disk is full.
    """
    watch, blocks, device = Stopwatch(resources.device), decoder.blocks, resources.device
    with ExitStack() as stack:
        with watch("load"):
            stack.enter_context(decoder.outside_blocks(device))
            inputs_NTC = embedded(decoder.model, blocks, calibration.tokens_NT, 1, resources.room, share)
            for block in blocks:
                stack.enter_context(decoder.opened(block, device))
                if not decoder.lasting:
                    tensors = ranks.tensors_from_first(journal.tensors(block.index) if journal is not None else {})
                    decoder.load_tensors(block, unrounded.decode(tensors, 0)[0] if grids else tensors)
        pupil = Pupil(
            Whole(decoder.model, blocks),
            [linear.name for record in records for linear in record.linears],
            calibration.tokens_NT[share.places],
            inputs_NTC,
            targets_NTC,
            share,
            seed,
            sum(block.seconds for block in records) + sum(watch.seconds.values()),
            head_share(decoder.model, blocks),
            {name: _at(grid, device) for name, grid in grids.items()},
        )
        with watch("distill"):
            states = _SharedSnapshots(Snapshots(journal.folder) if journal is not None else None)
            distilled = recipe.distill.distill(pupil, states, progress)
            quantized: dict[str, Quantized] = {}
            if (coding := recipe.quantization.coding) is not None:
                for block in blocks:
                    quantized |= round_block(block, grids, coding)
        seconds = watch.seconds
        record = DistillingRecord(
            epochs=distilled.epochs,
            losses=distilled.losses,
            passes=recipe.distill.passes(pupil.head, len(distilled.losses) - 1),
            seconds=sum(seconds.values()),
            phases=seconds,
            sent=watch.sent,
        )
        if journal is not None:
            rest = decoder.stored_outside(name for name in distilled.changed if not pupil.whole.place(name))
            changed = (
                (block.index, in_files(decoder, block, quantized, resources.codes))
                for block in blocks
                if distilled.helped or quantized
            )
            journal.keep_distilled(changed, rest, record)
            states.clear()
    return record


def _at(grid: Grid, device: torch.device) -> Grid:
    return Grid(grid.step_OG.to(device), grid.zero_OG.to(device), grid.bits)


class _SharedSnapshots:
    """The states of rank 0, from which all ranks go on.

    Args:
        own: of rank 0; None on the others.
    """

    def __init__(self, own: Snapshots | None) -> None:
        self._own = own

    @property
    def position(self) -> dict[str, Any] | None:
        """See `methods.distilling.distiller.Snapshots`."""
        return ranks.from_first(self._own.position if self._own is not None else None)

    def tensors(self, group: str) -> dict[str, Tensor]:
        """See `methods.distilling.distiller.Snapshots`."""
        return ranks.tensors_from_first(self._own.tensors(group) if self._own is not None else {})

    def keep(
        self, position: Mapping[str, Any], groups: Iterable[tuple[str, Mapping[str, Tensor]]], urgent: bool
    ) -> None:
        """See `methods.distilling.distiller.Snapshots`."""
        if self._own is not None:
            self._own.keep(position, groups, urgent)

    def clear(self) -> None:
        """Remove all states."""
        if self._own is not None:
            self._own.clear()
