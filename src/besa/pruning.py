"""Algorithm 1: prune a decoder block by block, each block learning from the ones before it.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from besa import memory, quantizing
from besa.activations import HiddenStates, allocate
from besa.allocation import Allocated, BlockProblem, RankedLinear, first_tokens
from besa.budget import Budget
from besa.calibration import Calibration
from besa.checkpoint.formats import packed
from besa.checkpoint.journal import Journal
from besa.finetuning import Finetuned
from besa.losses import error_between
from besa.masks import rank
from besa.models.blocks import capture_inputs
from besa.models.streaming import Decoder
from besa.models.units import Part, Unit, parts, units
from besa.progress import Progress, silent
from besa.quantization import MinMax, Quantized
from besa.recipe import Recipe
from besa.record import BlockRecord, linear_record
from besa.statistics import InputStatistics, collect, collect_both
from besa.stopwatch import Stopwatch
from besa.targets import Even
from besa.targets.bounded import Survey
from besa.targets.budgets import budgets, shared_names

CPU = torch.device("cpu")
# The error against the dense path is measured on one sequence in so many, and on this share of its tokens from the
# beginning: the same for every method, as the dense path need not go on with more for its sake.
ERROR_SHARE = 16
ERROR_TOKENS = 0.5


@dataclass(frozen=True)
class Resources:
    """How a run is computed; none of it changes what is learned beyond the order of floating-point sums.

    Attributes:
        batch: sequences in a forward pass.
        device: where blocks are computed.
        activation_budget: bytes of hidden states kept in memory; more go into a file.
        folder: where that file is made; by default where temporary files go.
        pack: quantised weights are kept as packed codes; else as the numbers they stand for.
    """

    batch: int = 4
    device: torch.device = CPU
    activation_budget: int = 1 << 62
    folder: Path | None = None
    pack: bool = True


def prune_blocks(
    decoder: Decoder,
    recipe: Recipe,
    calibration: Calibration,
    *,
    seed: int = 0,
    resources: Resources = Resources(),
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
        BesaError: activations are not finite, a block's zeros exceed its budget already, or the disk is full.
    """
    blocks = decoder.blocks
    whole = units(blocks, recipe.granularity)
    done = _done(journal, whole)
    targets = _targets(decoder, recipe, calibration, seed, resources, journal) if len(done) < len(blocks) else None
    plan = budgets(blocks, recipe, targets)
    quantization = recipe.quantization if isinstance(recipe.quantization, MinMax) else None
    if quantization is not None:
        quantizing.check(quantization, whole, plan)
        if journal is not None and resources.pack:
            packed.check(decoder.model, (name for own in plan for budget in own for name in budget.names))
    if journal is not None:
        journal.restored = len(done)
    last = max((place for place, unit in enumerate(whole) if unit.index not in done), default=-1)
    if last < 0:  # stopped while the checkpoint was put together
        return [done[block.index] for block in blocks]
    progress(0, len(blocks), "embeddings")
    pruned_NTC, dense_NTC = _first_inputs(decoder, recipe, calibration, resources)  # line 1
    records: list[BlockRecord] = []
    for place, (unit, unit_budgets) in enumerate(zip(whole[: last + 1], plan, strict=False)):  # line 2
        watch = Stopwatch(resources.device)
        with ExitStack() as stack:
            with watch("load"):
                for block in unit.blocks:
                    stack.enter_context(decoder.opened(block, resources.device))
            if place < last:
                for block in whole[place + 1].blocks:
                    decoder.expect(block)
            if unit.index in done:
                assert journal is not None
                for block in unit.blocks:
                    block.run(dense_NTC, resources.batch, into=dense_NTC)
                    tensors = journal.tensors(block.index)
                    decoder.fill(block, packed.unpack(tensors, quantization) if quantization else tensors)
                    block.run(pruned_NTC, resources.batch, into=pruned_NTC)
                    records.append(done[block.index])
                progress(len(records), len(blocks), "taken from the journal")
                continue
            step = _Step(unit, unit_budgets, recipe, pruned_NTC, dense_NTC, seed, resources, watch)
            found, quantized = _pruned(step)  # lines 3 to 12
            records += found
            if journal is not None:
                with watch("write"):
                    for block, record in zip(unit.blocks, found, strict=True):
                        own = {name: quantized[name] for name in block.prunables if name in quantized}
                        journal.keep(packed.pack(decoder.stored(block), own if resources.pack else {}), record)
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
    if isinstance(recipe.targets, Even):
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
    sizes = [sum(block.prunables[n].numel for n in own) for block, own in zip(decoder.blocks, names, strict=True)]
    if not any(sizes):
        return None
    wanted = journal.targets if journal is not None else None
    if wanted is None:
        wanted = recipe.targets.measure(survey)
        if journal is not None:
            journal.keep_targets(wanted)
    return recipe.targets.bounded(wanted, sizes, recipe.sparsity)


def _first_inputs(
    decoder: Decoder, recipe: Recipe, calibration: Calibration, resources: Resources
) -> tuple[HiddenStates, HiddenStates]:
    """Inputs of the first block: all of them for the pruned path, as much as the recipe needs for the dense path."""
    samples, seqlen = calibration.tokens_NT.shape
    share, length = dense_share(recipe, seqlen)
    lengths = {length, first_tokens(seqlen, recipe.descent.crop if recipe.descent else 1.0)}
    with decoder.embeddings():
        parts = capture_inputs(decoder.model, decoder.blocks, calibration.tokens_NT, resources.batch, lengths)
        for start, part_NTC in zip(range(0, samples, resources.batch), parts, strict=True):
            if start == 0:
                width, room = part_NTC.shape[-1], resources.activation_budget // 2
                pruned_NTC = allocate((samples, seqlen, width), part_NTC.dtype, room, resources.folder)
                dense_NTC = allocate((-(-samples // share), length, width), part_NTC.dtype, room, resources.folder)
            pruned_NTC[start : start + len(part_NTC)] = part_NTC
    for place in range(len(dense_NTC)):
        dense_NTC[place : place + 1] = pruned_NTC[place * share : place * share + 1][:, :length]
    return pruned_NTC, dense_NTC


def dense_share(recipe: Recipe, seqlen: int) -> tuple[int, int]:
    """What the dense path is needed for: one sequence in how many, and how many tokens of it from its beginning."""
    if recipe.whole_dense_path:
        return 1, seqlen
    if recipe.descent is None or recipe.teacher != "dense":
        return ERROR_SHARE, first_tokens(seqlen, ERROR_TOKENS)
    return 1, first_tokens(seqlen, max(ERROR_TOKENS, recipe.descent.crop))


@dataclass(frozen=True)
class _Step:
    """What is pruned at once, and what reaches it on both paths."""

    unit: Unit
    budgets: list[Budget]
    recipe: Recipe
    pruned_NTC: HiddenStates
    dense_NTC: HiddenStates
    seed: int
    resources: Resources
    watch: Stopwatch

    def room_like(self, x_NTC: HiddenStates) -> HiddenStates:
        """Room for as many hidden states again."""
        first_NTC = x_NTC[:1]
        shape = (len(x_NTC), first_NTC.shape[1], first_NTC.shape[2])
        return allocate(shape, first_NTC.dtype, self.resources.activation_budget // 2, self.resources.folder)


def _pruned(step: _Step) -> tuple[list[BlockRecord], dict[str, Quantized]]:
    """Decide what goes, take it out of the unit, and move both paths on to its outputs.

    Returns:
        What was done to each block, and the unit's quantised weights by name.
    """
    unit, recipe, watch = step.unit, step.recipe, step.watch
    halves = parts(unit, recipe.granularity)
    with watch("teacher"):
        halfway = [_halfway(step, part) for part in halves[:-1]]
    own_NTC = step.room_like(step.pruned_NTC) if recipe.teacher == "pruned" else None
    statistics, between = _watched(step, own_NTC)
    linears: dict[str, RankedLinear] = {}
    losses: list[float] = []
    quantized: dict[str, Quantized] = {}
    for part, targets_NTC in zip(halves, [*halfway, step.dense_NTC if own_NTC is None else own_NTC], strict=True):
        ranked, allocated, codes = _prune(step, part, targets_NTC, statistics)
        linears |= ranked
        losses += allocated.losses
        quantized |= codes
    with watch("finetune"):
        finetuned = recipe.finetune.tune(unit, list(linears), step.pruned_NTC, step.dense_NTC, step.seed + unit.index)
        for name, w_OI in finetuned.weights.items():
            unit.weight(name).detach().copy_(w_OI)
    return _records(step, linears, losses, finetuned, between), quantized


def _watched(step: _Step, own_NTC: HiddenStates | None) -> tuple[dict[str, InputStatistics], list[HiddenStates]]:
    """Move the dense path on (line 3), and send the pruned path through the unit as it is.

    Args:
        step: whose unit is still dense.
        own_NTC: where the outputs of the pruned path go; None throws them away.

    Returns:
        The statistics of the linears' inputs on the pruned path, and what the dense path has after each block.
    """
    unit, recipe, batch, watch = step.unit, step.recipe, step.resources.batch, step.watch
    if recipe.reconstruction.needs_cross:
        (block,) = unit.blocks
        with watch("statistics"):
            return collect_both(block, step.dense_NTC, step.pruned_NTC, batch, into=own_NTC), [step.dense_NTC]
    between = []
    with watch("teacher"):
        for block in unit.blocks:
            block.run(step.dense_NTC, batch, into=step.dense_NTC)
            between.append(step.dense_NTC if block is unit.blocks[-1] else _sampled(step))
    with watch("statistics"), ExitStack() as stack:
        collected = [
            stack.enter_context(collect(block.module, block.prunables, recipe.needs_gram)) for block in unit.blocks
        ]
        unit.run(step.pruned_NTC, batch, into=own_NTC)
    return {name: found for own in collected for name, found in own.items()}, between


def _prune(
    step: _Step, part: Part, targets_NTC: HiddenStates, statistics: Mapping[str, InputStatistics]
) -> tuple[dict[str, RankedLinear], Allocated, dict[str, Quantized]]:
    """Prune a part of the unit in place; returns what it was, what was decided, and its quantised weights."""
    unit, recipe, watch = step.unit, step.recipe, step.watch
    own = [budget for budget in step.budgets if budget.names[0] in part.names]
    with watch("rank"):
        linears = {name: _ranked(unit, name, recipe, statistics[name]) for budget in own for name in budget.names}
    at = unit.silencing(part.silent)
    problem = BlockProblem(at, linears, step.pruned_NTC, targets_NTC, own, step.seed + unit.index)
    quantized: dict[str, Quantized] = {}
    with watch("allocate"):
        if isinstance(recipe.quantization, MinMax):
            allocated, quantized = quantizing.allocate(problem, recipe, recipe.quantization, statistics)
        else:
            allocated = recipe.allocation.allocate(problem)  # lines 5 to 10
    with watch("rebuild"), torch.no_grad():
        for name, linear in linears.items():  # line 12
            if name in quantized:
                w_OI = quantized[name].weight()
            else:
                counts_O = allocated.counts[name].to(linear.w_OI.device)
                w_OI = recipe.reconstruction.rebuild(
                    linear.w_OI, linear.ranks_OI, counts_O, statistics[name], recipe.group
                )
            unit.weight(name).copy_(w_OI)
    return linears, allocated, quantized


def _halfway(step: _Step, part: Part) -> HiddenStates:
    """What the teacher puts out with the silent matrices of a part silent."""
    source_NTC = step.pruned_NTC if step.recipe.teacher == "pruned" else step.dense_NTC
    into_NTC = step.room_like(source_NTC)
    step.unit.silencing(part.silent).run(source_NTC, step.resources.batch, into=into_NTC)
    return into_NTC


def _sampled(step: _Step) -> HiddenStates:
    """As much of the dense path's states as the error is measured on."""
    stride = ERROR_SHARE if len(step.dense_NTC) == len(step.pruned_NTC) else 1
    tokens = first_tokens(step.pruned_NTC[:1].shape[1], ERROR_TOKENS)
    return torch.cat([step.dense_NTC[at : at + 1][:, :tokens] for at in range(0, len(step.dense_NTC), stride)])


def _ranked(unit: Unit, name: str, recipe: Recipe, statistics: InputStatistics) -> RankedLinear:
    """A weight of the unit in the order in which the recipe prunes it (line 4, eq. 2)."""
    w_OI = unit.weight(name).detach()
    importance_OI = recipe.importance.score(w_OI, statistics)
    ranks_OI = rank(importance_OI, w_OI, recipe.group)
    return RankedLinear(w_OI, importance_OI, ranks_OI, statistics.reached, recipe.importance.power)


def _records(
    step: _Step,
    linears: dict[str, RankedLinear],
    losses: list[float],
    finetuned: Finetuned,
    between: list[HiddenStates],
) -> list[BlockRecord]:
    """Move the pruned path on (line 11) and say what was done, counted in the blocks' weights as they are now.

    Args:
        step: whose weights are pruned by now.
        linears: what was pruned, by full name.
        losses: of the learning steps.
        finetuned: how the kept weights moved.
        between: what the dense path has after each block.
    """
    watch, counted = step.watch, []
    for block, dense_NTC in zip(step.unit.blocks, between, strict=True):
        with watch("propagate"):
            block.run(step.pruned_NTC, step.resources.batch, into=step.pruned_NTC)  # line 11
        with watch("measure"):
            tokens = first_tokens(step.pruned_NTC[:1].shape[1], ERROR_TOKENS)
            error = error_between(step.pruned_NTC, dense_NTC, ERROR_SHARE, tokens)
            own = [
                linear_record(name, block.weight(name).detach(), linear.importance_OI, linear.reached)
                for name, linear in linears.items()
                if name in block.prunables
            ]
        counted.append((block, error, own))
    share = len(counted)
    records = []
    for block, error, own in counted:
        weights, zeros = sum(linears[part.name].w_OI.numel() for part in own), sum(part.zeros for part in own)
        records.append(
            BlockRecord(
                index=block.index,
                name=block.name,
                weights=weights,
                zeros=zeros,
                sparsity=zeros / weights if weights else 0.0,
                reconstruction_error=error,
                losses=losses if block is step.unit.blocks[-1] else [],
                finetuning=finetuned.losses if block is step.unit.blocks[-1] else [],
                seconds=sum(watch.seconds.values()) / share,
                phases={phase: seconds / share for phase, seconds in watch.seconds.items()},
                linears=own,
            )
        )
    return records
