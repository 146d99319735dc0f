"""Algorithm 1: prune a decoder block by block, each block learning from the ones before it.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, O rows, I columns.
"""

from __future__ import annotations

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
from besa.models.blocks import Block, capture_inputs
from besa.models.streaming import Decoder
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
    done = {block.index: record for block in blocks if journal and (record := journal.record(block.index))}
    targets = _targets(decoder, recipe, calibration, seed, resources, journal) if len(done) < len(blocks) else None
    plan = budgets(blocks, recipe, targets)
    quantization = recipe.quantization if isinstance(recipe.quantization, MinMax) else None
    if quantization is not None:
        quantizing.check(quantization, blocks, plan)
        if journal is not None and resources.pack:
            packed.check(decoder.model, (name for own in plan for budget in own for name in budget.names))
    if journal is not None:
        journal.restored = len(done)
    last = max((block.index for block in blocks if block.index not in done), default=-1)
    if last < 0:  # stopped while the checkpoint was put together
        return [done[block.index] for block in blocks]
    progress(0, len(blocks), "embeddings")
    pruned_NTC, dense_NTC = _first_inputs(decoder, recipe, calibration, resources)  # line 1
    records: list[BlockRecord] = []
    for block, block_budgets in zip(blocks[: last + 1], plan, strict=False):  # line 2
        watch = Stopwatch(resources.device)
        with ExitStack() as stack:
            with watch("load"):
                stack.enter_context(decoder.opened(block, resources.device))
            if block.index < last:
                decoder.expect(blocks[block.index + 1])
            if block.index in done:
                assert journal is not None
                block.run(dense_NTC, resources.batch, into=dense_NTC)
                tensors = journal.tensors(block.index)
                decoder.fill(block, packed.unpack(tensors, quantization) if quantization else tensors)
                block.run(pruned_NTC, resources.batch, into=pruned_NTC)
                records.append(done[block.index])
                progress(len(records), len(blocks), "taken from the journal")
                continue
            step = _Step(block, block_budgets, recipe, pruned_NTC, dense_NTC, seed, resources, watch)
            record, quantized = _pruned(step)  # lines 3 to 12
            records.append(record)
            if journal is not None:
                with watch("write"):
                    journal.keep(packed.pack(decoder.stored(block), quantized if resources.pack else {}), record)
        memory.trim()
        progress(
            len(records),
            len(blocks),
            f"error {record.reconstruction_error:.4f}, sparsity {record.sparsity:.2%}",
        )
    records += [done[block.index] for block in blocks[last + 1 :]]
    return records


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
    """A block to prune, and what reaches it on both paths."""

    block: Block
    budgets: list[Budget]
    recipe: Recipe
    pruned_NTC: HiddenStates
    dense_NTC: HiddenStates
    seed: int
    resources: Resources
    watch: Stopwatch


def _pruned(step: _Step) -> tuple[BlockRecord, dict[str, Quantized]]:
    """Decide what goes, take it out of the block, and move both paths on to its outputs.

    Returns:
        What was done, and the block's quantised weights by name.
    """
    block, recipe, resources, watch = step.block, step.recipe, step.resources, step.watch
    own_NTC = None
    if recipe.teacher == "pruned":
        first_NTC = step.pruned_NTC[:1]
        shape = (len(step.pruned_NTC), first_NTC.shape[1], first_NTC.shape[2])
        own_NTC = allocate(shape, first_NTC.dtype, resources.activation_budget // 2, resources.folder)
    if recipe.reconstruction.needs_cross:
        with watch("statistics"):
            statistics = collect_both(block, step.dense_NTC, step.pruned_NTC, resources.batch, into=own_NTC)  # line 3
    else:
        with watch("teacher"):
            block.run(step.dense_NTC, resources.batch, into=step.dense_NTC)  # line 3
        with watch("statistics"), collect(block.module, block.prunables, recipe.needs_gram) as statistics:
            block.run(step.pruned_NTC, resources.batch, into=own_NTC)
    names = [name for budget in step.budgets for name in budget.names]
    with watch("rank"):
        linears = {name: _ranked(block, name, recipe, statistics[name]) for name in names}  # line 4
    targets_NTC = step.dense_NTC if own_NTC is None else own_NTC
    problem = BlockProblem(block, linears, step.pruned_NTC, targets_NTC, step.budgets, step.seed + block.index)
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
            block.weight(name).copy_(w_OI)
    with watch("finetune"):
        finetuned = recipe.finetune.tune(block, names, step.pruned_NTC, step.dense_NTC, problem.seed)
        for name, w_OI in finetuned.weights.items():
            block.weight(name).data.copy_(w_OI)
    with watch("propagate"):
        block.run(step.pruned_NTC, resources.batch, into=step.pruned_NTC)  # line 11
    return _record(step, linears, allocated, finetuned), quantized


def _ranked(block: Block, name: str, recipe: Recipe, statistics: InputStatistics) -> RankedLinear:
    """A weight of the block in the order in which the recipe prunes it (eq. 2)."""
    w_OI = block.weight(name).detach()
    importance_OI = recipe.importance.score(w_OI, statistics)
    return RankedLinear(
        w_OI, importance_OI, rank(importance_OI, w_OI, recipe.group), statistics.reached, recipe.importance.power
    )


def _record(step: _Step, linears: dict[str, RankedLinear], allocated: Allocated, finetuned: Finetuned) -> BlockRecord:
    """What was done to the block, counted in its weights as they are now."""
    block, watch = step.block, step.watch
    with watch("measure"):
        tokens = first_tokens(step.pruned_NTC[:1].shape[1], ERROR_TOKENS)
        error = error_between(step.pruned_NTC, step.dense_NTC, ERROR_SHARE, tokens)
        parts = [
            linear_record(name, block.weight(name).detach(), linear.importance_OI, linear.reached)
            for name, linear in linears.items()
        ]
    weights, zeros = sum(linear.w_OI.numel() for linear in linears.values()), sum(part.zeros for part in parts)
    return BlockRecord(
        index=block.index,
        name=block.name,
        weights=weights,
        zeros=zeros,
        sparsity=zeros / weights if weights else 0.0,
        reconstruction_error=error,
        losses=allocated.losses,
        finetuning=finetuned.losses,
        seconds=sum(watch.seconds.values()),
        phases=dict(watch.seconds),
        linears=parts,
    )
