"""The stage after the blocks: the whole pruned model learns to predict what the dense model predicts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from besa.methods.distilling import Student
from besa.models.activations import HiddenStates
from besa.models.whole import Whole, head_share
from besa.pruning.coded import in_files, round_block
from besa.pruning.loop import Pruned
from besa.pruning.run import Run
from besa.pruning.teacher import TeacherOutputs
from besa.quantization import Grid, Quantized
from besa.record import DistillingRecord
from besa.storage.formats import unrounded
from besa.storage.journal import Journal
from besa.storage.snapshots import Snapshots
from besa.system import ranks
from besa.system.stopwatch import Stopwatch

SPENT = "spent"  # key in a position: seconds of distilling


def distilled_before(journal: Journal | None) -> DistillingRecord | None:
    """The record of the distillation if an interrupted run had finished it; it comes from rank 0's journal."""
    record = journal.distilled if journal is not None else None
    kept: Any = ranks.from_first(record.model_dump(mode="json") if record is not None else None)
    return DistillingRecord.model_validate(kept) if kept is not None else None


def distill(run: Run, pruned: Pruned) -> DistillingRecord:
    """Distil a model whose blocks are pruned, with all blocks on the device at once.

    Args:
        run: the journal has the pruned blocks; states and the result are written to it. Progress is (steps done,
            steps, state) after every step.
        pruned: its sequences to distil on have been through the dense model.

    Raises:
        BesaError: the disk is full.
    """
    recipe, journal, watch = run.recipe, run.journal, Stopwatch(run.resources.device)
    assert pruned.teacher is not None
    with ExitStack() as stack:
        with watch("load"):
            _open(run, pruned, stack)
            inputs_NTC = pruned.teacher.inputs_NTC(run)
        student = _student(run, pruned, pruned.teacher, inputs_NTC)
        with watch("distill"):
            states = _SharedSnapshots(journal)
            distilled = recipe.distill.distill(student, states, run.progress)
            quantized = _rounded(run, pruned.grids)
        watch.seconds["distill"] += states.earlier
        record = DistillingRecord(
            epochs=distilled.epochs,
            losses=distilled.losses,
            passes=recipe.distill.passes(student.head, len(distilled.losses) - 1, student.training_set.epochs),
            study=student.training_set.calibration.describe(),
            seconds=sum(watch.seconds.values()),
            phases=watch.seconds,
            sent=watch.sent,
        )
        if journal is not None:
            rest = run.decoder.stored_outside(name for name in distilled.changed if not student.whole.place(name))
            changed = (
                (block.index, in_files(run.decoder, block, quantized, run.resources.codes))
                for block in run.decoder.blocks
                if distilled.helped or quantized
            )
            journal.keep_distilled(changed, rest, record)
            states.clear()
    return record


def _open(run: Run, pruned: Pruned, stack: ExitStack) -> None:
    """Bring the whole pruned model to the device until the stack ends."""
    decoder, device = run.decoder, run.resources.device
    stack.enter_context(decoder.outside_blocks(device))
    for block in decoder.blocks:
        stack.enter_context(decoder.opened(block, device))
        if not decoder.lasting:
            tensors = run.kept(block)
            decoder.load_tensors(block, unrounded.decode(tensors, 0)[0] if pruned.grids else tensors)


def _student(run: Run, pruned: Pruned, teacher: TeacherOutputs, inputs_NTC: HiddenStates) -> Student:
    """What learns, and what it learns from.

    Args:
        run: its model is open.
        pruned: its blocks.
        teacher: its sequences have been through the dense model.
        inputs_NTC: of the first block.
    """
    decoder, device = run.decoder, run.resources.device
    return Student(
        whole=Whole(decoder.model, decoder.blocks),
        linears=[linear.name for record in pruned.records for linear in record.linears],
        tokens_NT=teacher.tokens_NT,
        inputs_NTC=inputs_NTC,
        targets_NTC=teacher.outputs_NTC,
        training_set=teacher.training_set,
        share=teacher.share,
        seed=run.seed,
        seconds=run.spent,
        head=head_share(decoder.model, decoder.blocks),
        grids={name: grid.to(device) for name, grid in pruned.grids.items()},
    )


def _rounded(run: Run, grids: Mapping[str, Grid]) -> dict[str, Quantized]:
    """Round, in place, the weights that have learned; return them by full name, or nothing if there are no grids."""
    quantized: dict[str, Quantized] = {}
    if (coding := run.recipe.quantization.coding) is not None:
        for block in run.decoder.blocks:
            quantized |= round_block(block, grids, coding)
    return quantized


class _SharedSnapshots:
    """Snapshots kept by rank 0, from which all ranks resume.

    Args:
        journal: of rank 0; None on the others.

    Attributes:
        earlier: seconds that interrupted processes distilled until the last state.
    """

    def __init__(self, journal: Journal | None) -> None:
        self._journal, self._began = journal, time.perf_counter()
        self._own = Snapshots(journal.folder) if journal is not None else None
        self.earlier: float = (self.position or {}).get(SPENT, 0.0)

    @property
    def position(self) -> dict[str, Any] | None:
        """See `methods.distilling.snapshots.Snapshots`."""
        return ranks.from_first(self._own.position if self._own is not None else None)

    def tensors(self, group: str) -> dict[str, Tensor]:
        """See `methods.distilling.snapshots.Snapshots`."""
        return ranks.tensors_from_first(self._own.tensors(group) if self._own is not None else {})

    def keep(
        self, position: Mapping[str, Any], groups: Iterable[tuple[str, Mapping[str, Tensor]]], urgent: bool
    ) -> None:
        """See `methods.distilling.snapshots.Snapshots`."""
        if self._own is None or self._journal is None:
            return
        spent = self.earlier + time.perf_counter() - self._began
        if self._own.keep({**position, SPENT: spent}, groups, urgent):
            self._journal.note_time()

    def clear(self) -> None:
        """Remove all states."""
        if self._own is not None:
            self._own.clear()
