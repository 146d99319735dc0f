"""Algorithm 1: prune a decoder block by block, each block learning from the ones before it."""

from __future__ import annotations

from contextlib import ExitStack

from besa.data.calibration import Calibration
from besa.methods.recipe import Recipe
from besa.methods.targets.bounded import Survey
from besa.methods.targets.budgets import budgets, shared_names
from besa.models.check import Check
from besa.models.streaming import Decoder
from besa.models.units import Unit, units
from besa.progress import Progress, silent
from besa.pruning import quantizing
from besa.pruning.paths import PLAIN, Resources, first_inputs
from besa.pruning.step import Step, prune_unit
from besa.record import BlockRecord
from besa.storage.formats import codes
from besa.storage.journal import Journal
from besa.system import memory
from besa.system.stopwatch import Stopwatch


def prune_blocks(
    decoder: Decoder,
    recipe: Recipe,
    calibration: Calibration,
    *,
    seed: int = 0,
    resources: Resources = PLAIN,
    journal: Journal | None = None,
    progress: Progress = silent,
) -> list[BlockRecord]:
    """Prune a decoder by `recipe`, one block at a time, and tell what was done to each block.

    Args:
        decoder: causal decoder in evaluation mode.
        recipe: the method.
        calibration: token ids (N, T).
        seed: of whatever the allocation draws.
        resources: how to compute.
        journal: gets every block as it is done; blocks that it has already are taken from there.
        progress: told (blocks done, blocks, state) after every block.

    Raises:
        BesaError: the blocks cannot be run one by one, activations are not finite, a block's zeros exceed its budget
            already, or the disk is full.
    """
    blocks = decoder.blocks
    whole = units(blocks, recipe.granularity)
    done = _done(journal, whole)
    check = Check(decoder, calibration.tokens_NT) if len(done) < len(blocks) else None
    targets = _targets(decoder, recipe, calibration, seed, resources, journal) if len(done) < len(blocks) else None
    plan = budgets(blocks, recipe, targets)
    quantization = recipe.quantization.coding
    if quantization is not None:
        quantizing.check(quantization, whole, plan)
        if journal is not None and resources.codes:
            codes.check(decoder.model, (name for own in plan for budget in own for name in budget.names))
    if journal is not None:
        journal.restored = len(done)
    if check is None:  # stopped while the checkpoint was put together
        return [done[block.index] for block in blocks]
    last = max(place for place, unit in enumerate(whole) if unit.index not in done)
    progress(0, len(blocks), "embeddings")
    pruned_NTC, dense_NTC = first_inputs(decoder, recipe, calibration, resources)  # line 1
    records: list[BlockRecord] = []
    for place, (unit, unit_budgets) in enumerate(zip(whole[: last + 1], plan, strict=False)):  # line 2
        watch = Stopwatch(resources.device)
        with ExitStack() as stack:
            with watch("load"):
                for block in unit.blocks:
                    stack.enter_context(decoder.opened(block, resources.device))
            with watch("check"):
                for block in unit.blocks:
                    check.see(block)
            if place < last:
                for block in whole[place + 1].blocks:
                    decoder.expect(block)
            if unit.index in done:
                assert journal is not None
                for block in unit.blocks:
                    block.run(dense_NTC, resources.batch, into=dense_NTC)
                    tensors = journal.tensors(block.index)
                    decoder.fill(block, codes.decode(tensors, quantization) if quantization else tensors)
                    block.run(pruned_NTC, resources.batch, into=pruned_NTC)
                    records.append(done[block.index])
                progress(len(records), len(blocks), "taken from the journal")
                continue
            step = Step(unit, unit_budgets, recipe, pruned_NTC, dense_NTC, seed, resources, watch)
            found, quantized = prune_unit(step)  # lines 3 to 12
            records += found
            if journal is not None:
                with watch("write"):
                    for block, record in zip(unit.blocks, found, strict=True):
                        own = {
                            decoder.name_in_files(name): quantized[name]
                            for name in block.prunables
                            if name in quantized
                        }
                        journal.keep(codes.encode(decoder.stored(block), own if resources.codes else {}), record)
        memory.trim()
        progress(
            len(records),
            len(blocks),
            f"error {records[-1].reconstruction_error:.4f}, sparsity {records[-1].sparsity:.2%}",
        )
    records += [done[block.index] for unit in whole[last + 1 :] for block in unit.blocks]
    return records


def _done(journal: Journal | None, whole: list[Unit]) -> dict[int, BlockRecord]:
    """Records of the blocks that need not be pruned again, by index: those of units of which the journal has all."""
    done: dict[int, BlockRecord] = {}
    for unit in whole if journal else ():
        assert journal is not None
        found = [journal.record(block.index) for block in unit.blocks]
        if all(found):
            done |= {record.index: record for record in found if record}
    return done


def _targets(
    decoder: Decoder, recipe: Recipe, calibration: Calibration, seed: int, resources: Resources, journal: Journal | None
) -> list[float] | None:
    """The sparsity of each block, None where it is the same; what was measured once is in the journal."""
    measuring = recipe.targets.measuring
    if measuring is None:
        return None
    names, _ = shared_names(decoder.blocks, recipe)
    survey = Survey(
        decoder,
        calibration,
        names,
        recipe.sparsity,
        resources.batch,
        resources.device,
        resources.activation_budget,
        resources.folder,
        seed,
    )
    if not any(survey.sizes):
        return None
    wanted = journal.targets if journal is not None else None
    if wanted is None:
        wanted = measuring.measure(survey)
        if journal is not None:
            journal.keep_targets(wanted)
    return measuring.bounded(wanted, survey.sizes, recipe.sparsity)
