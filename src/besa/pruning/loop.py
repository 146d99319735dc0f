"""Algorithm 1: prune a decoder block by block, each block learning from the ones before it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field

from besa.data.calibration import Calibration
from besa.methods.recipe import Recipe
from besa.methods.targets.budgets import budgets
from besa.models.activations import HiddenStates
from besa.models.check import Check
from besa.models.streaming import Decoder
from besa.models.units import Unit, units
from besa.progress import BlockDone, BlockNote, Progress, silent
from besa.pruning import quantizing
from besa.pruning.coded import put_back, to_keep
from besa.pruning.measuring import Measured, measure
from besa.pruning.paths import PLAIN, Resources, first_inputs
from besa.pruning.step import Step, prune_unit
from besa.quantization import Grid
from besa.record import BlockRecord
from besa.storage.formats import codes
from besa.storage.journal import Journal
from besa.system import memory, ranks
from besa.system.ranks import Share
from besa.system.stopwatch import Stopwatch


@dataclass(frozen=True)
class Pruned:
    """Blocks that are pruned, and what is left of the dense path.

    Attributes:
        records: of the blocks.
        dense_NTC: where the dense path has come to, of the sequences and tokens that the recipe needs; None if nothing
            was run.
        share: the sequences of this rank.
        grids: by full name, of linears that are to be rounded after distilling.
    """

    records: list[BlockRecord]
    dense_NTC: HiddenStates | None
    share: Share
    grids: dict[str, Grid] = field(default_factory=dict)


def prune_blocks(
    decoder: Decoder,
    recipe: Recipe,
    calibration: Calibration,
    *,
    dense: Decoder | None = None,
    seed: int = 0,
    resources: Resources = PLAIN,
    journal: Journal | None = None,
    progress: Progress = silent,
    to_the_end: bool = False,
) -> Pruned:
    """Prune a decoder by `recipe`, one block at a time.

    Args:
        decoder: causal decoder in evaluation mode.
        recipe: the method.
        calibration: token ids (N, T).
        dense: of the dense path, if the decoder has lost experts; by default the decoder.
        seed: of random choices, such as the order of sequences.
        resources: how to compute.
        journal: every finished block is written to it; blocks that it already holds are not pruned again. Only rank 0
            has one.
        progress: is called with (blocks done, blocks, state) after every block, and with none done before the first.
        to_the_end: run the dense path to its end, even if the journal has the last blocks.

    Raises:
        BesaError: the blocks cannot be run one by one, activations are not finite, a block already has more zeros than
            its budget allows, or the disk is full.
    """
    blocks = decoder.blocks
    in_order = units(blocks, recipe.granularity)
    whole = units(dense.blocks, recipe.granularity) if dense is not None else in_order
    share = Share.of(calibration.samples, resources.batch)
    done = _done(journal, in_order)
    check = Check(decoder, calibration.tokens_NT, resources.device) if len(done) < len(blocks) else None
    measured = Measured()
    if len(done) < len(blocks):
        measured = measure(decoder, recipe, calibration, seed, resources, journal, progress)
    plan = budgets(blocks, recipe, measured.targets)
    quantization = recipe.quantization.coding
    if quantization is not None:
        quantizing.check(quantization, in_order, plan)
        if journal is not None and resources.codes:
            planned = (name for unit_budgets in plan for budget in unit_budgets for name in budget.names)
            codes.check(decoder.model, planned)
    if journal is not None:
        journal.restored = len(done)
    open_units = [place for place, unit in enumerate(in_order) if unit.index not in done]
    if not (open_units or to_the_end):  # the earlier run stopped while it assembled the checkpoint
        return Pruned([done[block.index] for block in blocks], None, share)
    last_open = max(open_units, default=-1)
    last = len(in_order) - 1 if to_the_end else last_open
    progress(0, len(blocks), "embeddings")
    pruned_NTC, dense_NTC = first_inputs(decoder, recipe, calibration, resources, share)  # line 1
    if dense is not None:
        for block, dense_block in zip(blocks, dense.blocks, strict=True):
            dense_block.arguments.update(block.arguments)
    records: list[BlockRecord] = []
    grids: dict[str, Grid] = {}
    for place, (unit, unit_budgets) in enumerate(zip(in_order[: last + 1], plan, strict=False)):  # line 2
        watch = Stopwatch(resources.device)
        with ExitStack() as stack:
            with watch("load"):
                for block in unit.blocks:
                    stack.enter_context(decoder.opened(block, resources.device))
                if dense is not None:
                    for block in whole[place].blocks:
                        stack.enter_context(dense.opened(block, resources.device))
            if check is not None:
                with watch("check"):
                    for block in unit.blocks:
                        check.see(block)
            if place < last:
                for block in in_order[place + 1].blocks:
                    decoder.prefetch(block, resources.device)
            if unit.index in done:
                for block, dense_block in zip(unit.blocks, whole[place].blocks, strict=True):
                    dense_block.run(dense_NTC, resources.batch, into=dense_NTC)
                    tensors = ranks.tensors_from_first(journal.tensors(block.index) if journal is not None else {})
                    grids |= put_back(decoder, block, tensors, recipe)
                    if place < last_open:
                        block.run(pruned_NTC, resources.batch, into=pruned_NTC)
                    records.append(done[block.index])
                    progress(len(records), len(blocks), _note(done[block.index], restored=True))
                continue
            paths_NTC, gradients = (pruned_NTC, dense_NTC), measured.gradients
            step = Step(unit, whole[place], unit_budgets, recipe, *paths_NTC, share, gradients, seed, resources, watch)
            unit_records, coded = prune_unit(step)  # lines 3 to 12
            if recipe.rounds_last:
                for name, weight in coded.unrounded.items():
                    grids[name] = weight.grid
                    unit.weight(name).detach().copy_(weight.w_OI)
            ranks.check_same(unit.blocks[-1].name, [unit.weight(name) for name in unit.prunables])
            if journal is not None:
                with watch("write"):
                    journal.settle()  # before there are two blocks to be written
                    for block, record in zip(unit.blocks, unit_records, strict=True):
                        journal.keep(to_keep(decoder, block, coded, recipe, resources.codes), record)
        memory.trim()
        for record in unit_records:
            records.append(record)
            progress(len(records), len(blocks), _note(record))
    if journal is not None:
        journal.settle()
    records += [done[block.index] for unit in in_order[last + 1 :] for block in unit.blocks]
    return Pruned(records, dense_NTC, share, grids)


def _note(record: BlockRecord, *, restored: bool = False) -> BlockNote:
    block = BlockDone(record.name, record.reconstruction_error, record.sparsity, record.seconds, restored)
    return BlockNote(block)


def _done(journal: Journal | None, in_order: list[Unit]) -> dict[int, BlockRecord]:
    """Records by index of the blocks that need no pruning: the journal of rank 0 holds all blocks of their unit."""
    done: list[BlockRecord] = []
    for unit in in_order if journal is not None else ():
        assert journal is not None
        kept = [record for block in unit.blocks if (record := journal.record(block.index)) is not None]
        done += kept if len(kept) == len(unit.blocks) else []
    known = ranks.from_first([record.model_dump(mode="json") for record in done])
    return {record.index: record for record in map(BlockRecord.model_validate, known)}
