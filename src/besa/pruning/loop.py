"""Algorithm 1: prune a decoder block by block, each block learning from the ones before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from besa.data.calibration import Calibration
from besa.methods.distilling import TrainingSet
from besa.methods.recipe import Recipe
from besa.models.streaming import Decoder
from besa.models.units import Unit, units
from besa.progress import BlockDone, BlockNote
from besa.pruning.coded import Coded, put_back, to_keep
from besa.pruning.paths import PLAIN, Resources, first_inputs
from besa.pruning.preparing import Prepared, prepare
from besa.pruning.run import Run
from besa.pruning.step import Step, prune_unit
from besa.pruning.teacher import TeacherOutputs
from besa.quantization import Grid
from besa.record import BlockRecord
from besa.storage.formats import unrounded
from besa.system import memory, ranks
from besa.system.stopwatch import Stopwatch


@dataclass(frozen=True)
class Pruned:
    """Blocks that are pruned, and what distilling needs besides them.

    Attributes:
        records: of the blocks.
        teacher: of the sequences to distil on, which have been through the dense model; None if there are none.
        grids: by full name, of linears that are to be rounded after distilling.
    """

    records: list[BlockRecord]
    teacher: TeacherOutputs | None = None
    grids: dict[str, Grid] = field(default_factory=dict)


def prune_blocks(decoder: Decoder, recipe: Recipe, calibration: Calibration, *, resources: Resources = PLAIN) -> Pruned:
    """Algorithm 1 by itself: prune the blocks of a decoder, without what comes before and after them in a run.

    Args:
        decoder: causal decoder in evaluation mode.
        recipe: the method.
        calibration: token ids (N, T).
        resources: how to compute.

    Raises:
        BesaError: as of `prepare` and `prune_units`.
    """
    run = Run(decoder, recipe, calibration, resources=resources)
    return prune_units(run, prepare(run))


def prune_units(run: Run, prepared: Prepared, training_set: TrainingSet | None = None) -> Pruned:
    """Prune the decoder of a run, one unit at a time; those that the journal holds are not pruned again.

    Args:
        run: the journal gets every block that is finished.
        prepared: of the run.
        training_set: is run through the dense model, even if the journal has the last blocks, to distil on it; None for
            nothing.

    Raises:
        BesaError: a block does not compute alone what it does in the model, activations are not finite, as of
            `prune_unit`, or the disk is full.
    """
    if run.journal is not None:
        run.journal.restored = len(prepared.done)
    blocks, done = run.decoder.blocks, prepared.done
    if prepared.last_open < 0 and training_set is None:  # the earlier run stopped while it assembled the checkpoint
        return Pruned([done[block.index] for block in blocks])
    run.progress(0, len(blocks), "embeddings")
    walk = _Walk(run, prepared, training_set)  # line 1
    for place in range(walk.last + 1):  # line 2
        walk.through(place)
    if run.journal is not None:
        run.journal.settle()
    rest = [done[block.index] for block in blocks[len(walk.records) :]]
    return Pruned([*walk.records, *rest], walk.teacher, walk.grids)


class _Walk:
    """Moves the pruned path, the dense path and the sequences to distil on through the units of a decoder.

    Args:
        run: what is pruned, and how.
        prepared: of the run.
        training_set: what is run through the dense model to distil on it; None for nothing.

    Attributes:
        last: place of the last unit on the way; no later one is to be pruned or run.
        teacher: of the sequences to distil on; None without distilling.
        records: of the blocks on the way so far.
        grids: by full name, of linears that are to be rounded after distilling.
    """

    def __init__(self, run: Run, prepared: Prepared, training_set: TrainingSet | None) -> None:
        self._run, self._prepared, self._units = run, prepared, prepared.units
        self._whole = units(run.dense.blocks, run.recipe.granularity) if run.dense is not None else prepared.units
        self._last_open = prepared.last_open
        self.last = len(self._units) - 1 if training_set is not None else self._last_open
        self._pruned_NTC, self._dense_NTC = first_inputs(
            run.decoder, run.recipe, run.calibration, run.resources, run.share
        )
        self.teacher = TeacherOutputs.begun(run, training_set) if training_set is not None else None
        if run.dense is not None:
            for block, dense_block in zip(run.decoder.blocks, run.dense.blocks, strict=True):
                dense_block.arguments.update(block.arguments)
        self.records: list[BlockRecord] = []
        self.grids: dict[str, Grid] = {}

    def through(self, place: int) -> None:
        """Move both paths through the unit at a place, which is pruned, or comes from the journal."""
        unit, watch = self._units[place], Stopwatch(self._run.resources.device)
        with self._opened(place, watch):
            if self._prepared.check is not None:
                with watch("check"):
                    for block in unit.blocks:
                        self._prepared.check.see(block)
            if place < self.last:
                for block in self._units[place + 1].blocks:
                    self._run.decoder.prefetch(block, self._run.resources.device)
            if self.teacher is not None:
                with watch("dense"):
                    self.teacher.through(self._whole[place])
            if unit.index in self._prepared.done:
                self._restore(place)
                return
            records, coded = self._prune(place, watch)
            self._keep(unit, records, coded, watch)
        memory.trim()
        for record in records:
            self._finish(record)

    @contextmanager
    def _opened(self, place: int, watch: Stopwatch) -> Iterator[None]:
        """While open, the blocks of a unit have their weights, those of the dense path too."""
        run, device = self._run, self._run.resources.device
        with ExitStack() as stack:
            with watch("load"):
                for block in self._units[place].blocks:
                    stack.enter_context(run.decoder.opened(block, device))
                if run.dense is not None:
                    for block in self._whole[place].blocks:
                        stack.enter_context(run.dense.opened(block, device))
            yield

    def _restore(self, place: int) -> None:
        """Put back a finished unit, and run its blocks, dense and pruned, if a later unit is to be pruned."""
        batch = self._run.resources.batch
        for block, dense_block in zip(self._units[place].blocks, self._whole[place].blocks, strict=True):
            if place < self._last_open:
                dense_block.run(self._dense_NTC, batch, into=self._dense_NTC)
            self.grids |= put_back(self._run.decoder, block, self._run.kept(block), self._run.recipe)
            if place < self._last_open:
                block.run(self._pruned_NTC, batch, into=self._pruned_NTC)
            if self._run.recipe.rounds_last:  # distilling begins with the weights as they were before their rounding
                self._run.decoder.load_tensors(block, unrounded.decode(self._run.kept(block), 0)[0])
            self._finish(self._prepared.done[block.index], restored=True)

    def _prune(self, place: int, watch: Stopwatch) -> tuple[list[BlockRecord], Coded]:
        """Prune a unit (lines 3 to 12); returns a record of each block, and the quantised weights."""
        run, unit = self._run, self._units[place]
        step = Step(
            run=run,
            unit=unit,
            whole=self._whole[place],
            budgets=self._prepared.budgets[place],
            pruned_NTC=self._pruned_NTC,
            dense_NTC=self._dense_NTC,
            gradients=self._prepared.gradients,
            watch=watch,
        )
        records, coded = prune_unit(step)
        if run.recipe.rounds_last:
            for name, weight in coded.unrounded.items():
                self.grids[name] = weight.grid
                unit.weight(name).detach().copy_(weight.w_OI)
        ranks.check_same(unit.blocks[-1].name, [unit.weight(name) for name in unit.prunables])
        return records, coded

    def _keep(self, unit: Unit, records: list[BlockRecord], coded: Coded, watch: Stopwatch) -> None:
        """Add a finished unit to the journal.

        Raises:
            BesaError: the disk is full.
        """
        run = self._run
        if run.journal is None:
            return
        with watch("write"):
            run.journal.settle()  # before there are two blocks to be written
            for block, record in zip(unit.blocks, records, strict=True):
                run.journal.keep(to_keep(run.decoder, block, coded, run.recipe, run.resources.codes), record)

    def _finish(self, record: BlockRecord, *, restored: bool = False) -> None:
        """Add the record of a block, and report progress."""
        self.records.append(record)
        done = BlockDone(record.name, record.reconstruction_error, record.sparsity, record.seconds, restored)
        self._run.progress(len(self.records), len(self._run.decoder.blocks), BlockNote(done))
