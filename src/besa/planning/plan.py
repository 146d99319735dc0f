"""What a run needs, computed before it from the model's configuration alone."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch
from pydantic import BaseModel
from transformers import PreTrainedModel

from besa.counting.budget import Budget
from besa.errors import BesaError
from besa.methods.allocation import first_tokens
from besa.methods.recipe import Recipe
from besa.methods.targets.budgets import budgets
from besa.models.activations import Place, Room
from besa.models.blocks import Block, left_dense
from besa.models.mixtures import Fewer
from besa.models.units import Unit, units
from besa.models.whole import head_share
from besa.planning.passes import forward_passes, most, shares_of, states_measured
from besa.planning.peak import learning_bytes, stored_bytes, unit_bytes
from besa.planning.shapes import learn_arguments, shared_inputs
from besa.planning.traffic import traffic
from besa.planning.whole import whole_bytes, whole_disk_bytes
from besa.pruning.paths import dense_share
from besa.quantization import Coding
from besa.runtime.own_text import PASSES, sizes_of
from besa.system import memory
from besa.system.devices import is_available, shares_memory, total_bytes
from besa.system.ranks import together

PLACES: tuple[Place, ...] = get_args(Place)
# Tokens for each column of a Gram matrix, at least. Of C independent columns and n tokens, its eigenvalues are off by
# factors of up to (1 ± √(C/n))² (Marchenko and Pastur): from n = 4 C on, by 1/4 to 9/4 at the most.
ENOUGH = 4
TEXT = 64 << 20  # bytes of the tokenizer and the calibration text while they are read


class Plan(BaseModel):
    """What a run needs. Of several ranks, hidden states, memory and passes are those of one: of the one with the most.

    Attributes:
        model: its name.
        architecture: class of the model.
        blocks: number of blocks.
        parameters: number of parameters of the whole model.
        prunable_weights: number of weights to prune: those of the blocks' matrices that stay and are not skipped.
        zeros: how many of these become zero.
        structures: of structures that go whole, how many all blocks have and how many stay, by kind.
        experts: number of experts of each mixture before and after; None if all stay.
        mixtures: number of mixtures that lose experts.
        dropped: parameters that go with them.
        model_sparsity: zeros, and what goes with experts, as a share of all parameters.
        dense: weights of the blocks' matrices that stay dense, by name within a block.
        checkpoint_bytes: size of the pruned checkpoint.
        disk_bytes: free space needed during the run, for journal, checkpoint and activations of all ranks.
        ranks: processes on this machine that share the work, one for each device.
        sequences: calibration sequences of a rank.
        traffic_bytes: that a rank sends to others for a block, by phase; see `planning.traffic`.
        activation_bytes: size of all hidden states kept between blocks.
        activation_places: how many bytes they take on the ``device``, in memory of the ``host``, and in a ``file``.
        memory_bytes: expected peak of the process.
        gpu_memory_bytes: expected peak on the GPU; None for a device that computes in the machine's memory.
        distilling_bytes: memory where the whole model is distilled, hidden states of the calibration set aside; 0 if it
            is not. It is within the peaks.
        forward_passes: over the calibration set (the sequences of a rank) through all blocks; a backward pass counts as
            two.
        writing_passes: the arithmetic of writing the model's own text, in forward passes; it takes longer than these,
            as tokens come one by one.
        fits: whether this machine has enough memory and disk for all ranks, and for a run on GPUs, one with enough
            memory for each.
        lacking: what this machine has too little of, in words.
        warnings: what could cost quality, one sentence each.
    """

    model: str
    architecture: str
    blocks: int
    parameters: int
    prunable_weights: int
    zeros: int
    structures: dict[str, tuple[int, int]] = {}
    experts: tuple[int, int] | None = None
    mixtures: int = 0
    dropped: int = 0
    model_sparsity: float
    dense: dict[str, int]
    checkpoint_bytes: int
    disk_bytes: int
    ranks: int
    sequences: int
    traffic_bytes: dict[str, int]
    activation_bytes: int
    activation_places: dict[Place, int]
    memory_bytes: int
    gpu_memory_bytes: int | None
    distilling_bytes: int
    forward_passes: float
    writing_passes: float = 0.0
    fits: bool
    lacking: list[str]
    warnings: list[str] = []


def work_out(
    name: str,
    model: PreTrainedModel,
    blocks: list[Block],
    recipe: Recipe,
    *,
    fewer: Fewer | None = None,
    samples: int,
    seqlen: int,
    batch: int,
    device: torch.device,
    activation_budget: int | None,
    folder: Path,
    ranks: int = 1,
    own: float = 0.0,
) -> Plan:
    """Work out what a run needs.

    Args:
        name: of the model, as the user gave it.
        model: a skeleton on the meta device, in the dtype of the run, without the experts that are dropped.
        blocks: of the model.
        recipe: the method.
        fewer: how it lost experts, if it did.
        samples: calibration sequences.
        seqlen: tokens of a calibration sequence.
        batch: sequences in a forward pass.
        device: where blocks would be computed; this machine need not have it.
        activation_budget: as in `Room`; if the device is not here, its memory has no limit by default.
        folder: where the checkpoint would be written.
        ranks: processes on this machine, one for each device.
        own: share of the sequences that the model writes itself; rank 0 loads it whole for that.

    Raises:
        BesaError: a pattern of the recipe matches nothing, or one batch needs more than the memory of this machine.
    """
    in_order = units(blocks, recipe.granularity)
    budgets_of_units = budgets(blocks, recipe)
    plan = [budget for unit_budgets in budgets_of_units for budget in unit_budgets]
    parameters, item = model.num_parameters(), model.dtype.itemsize
    dropped = fewer.dropped if fewer is not None else 0
    size = parameters * item
    if recipe.quantization.coding is not None:
        names = {name for budget in plan for name in budget.names}
        size -= item * sum(budget.weights for budget in plan)
        size += _code_bytes(recipe.quantization.coding, blocks, names, item)
    channels: int = model.config.get_text_config().hidden_size
    share, tokens = dense_share(recipe, seqlen)
    shares = shares_of(samples, batch, ranks)
    sequences = most(shares)
    stream = sequences * seqlen * channels * item
    teacher = recipe.teacher
    dense_stream = most(shares, share) * tokens * channels * item
    two_parts = recipe.granularity == "attn-mlp"  # attention has its own teacher
    target = stream if teacher == "pruned" else dense_stream
    streams = [stream, dense_stream, *([target] if two_parts else []), *([stream] if teacher == "pruned" else [])]
    surveyed = [stream // sequences] * states_measured(recipe, samples, len(blocks), batch, ranks)
    # What is measured on the dense model is freed before the others are allocated.
    with together(0, ranks):  # they share the host's memory
        in_turn = [_placed(sizes, Room(device, activation_budget)) for sizes in (streams, surveyed)]
    places = {place: max(placed[place] for placed in in_turn) for place in PLACES}
    if batch * seqlen * channels * item > memory.total_bytes():
        raise BesaError(
            f"A batch of {batch:,} × {seqlen:,} tokens needs more memory than this machine has: lower --batch or "
            "--seqlen."
        )
    crop = first_tokens(seqlen, recipe.descent.crop if recipe.descent else 1.0)
    learn_arguments(model, blocks, {(batch, seqlen), (1, seqlen), (1, crop)})
    inside = {id(parameter) for block in blocks for parameter in block.module.parameters()}
    outside = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in inside)
    if recipe.losses_every(samples):  # predictions, their logarithms and gradients
        outside += 20 * seqlen * model.config.get_text_config().vocab_size
    pruned = {name for budget in plan for name in budget.names}
    whole = whole_bytes(model, blocks, pruned, recipe, seqlen)
    work, learning, sent = 0, 0, Counter[str]()
    for unit, unit_budgets in _distinct(in_order, budgets_of_units):
        inputs = shared_inputs(unit, model, seqlen)
        work = max(work, unit_bytes(model, unit, inputs, recipe, batch, seqlen))
        learning = max(learning, learning_bytes(model, unit, seqlen) if whole else 0)
        of_unit = traffic(unit, inputs, unit_budgets, recipe, samples, channels, ranks)
        of_block = Counter({phase: size // len(unit.blocks) for phase, size in of_unit.items()})
        sent = max(sent, of_block, key=Counter.total)
    unit_size = max(stored_bytes(unit) for unit in in_order)
    if fewer is not None:  # a block with all its experts is there for the dense path
        whole_size = max(stored_bytes(unit) for unit in units(fewer.whole, recipe.granularity))
        work, unit_size = work + whole_size, unit_size + whole_size
    distilling = whole + learning
    on_device = places["device"] + max(outside, work, distilling)
    gpu = None if shares_memory(device) else on_device
    needs = memory.current_bytes() + TEXT + places["host"] + (on_device if gpu is None else 2 * unit_size)
    routed = any(prunable.routed for block in blocks for prunable in block.prunables.values())
    disk = whole_disk_bytes(model, blocks, pruned, recipe, size) + ranks * places["file"]
    zeros = sum(budget.zeros for budget in plan)
    most_at_once = ranks * needs
    if own:
        weights, cache = sizes_of(model, seqlen, device)
        writing = memory.current_bytes() + TEXT + weights + (cache if gpu is None else 0)
        needs, most_at_once = max(needs, writing), max(most_at_once, writing)
        gpu = None if gpu is None else max(gpu, weights + cache)
    lacking = list(_lacking(most_at_once, gpu, disk, device, folder, ranks))
    widths = [prunable.columns for block in blocks for name, prunable in block.prunables.items() if name in pruned]
    return Plan(
        model=name,
        architecture=type(model).__name__,
        blocks=len(blocks),
        parameters=parameters + dropped,
        prunable_weights=sum(budget.weights for budget in plan),
        zeros=zeros,
        structures=_structures(in_order, budgets_of_units, recipe),
        experts=(fewer.mixtures.experts, fewer.kept) if fewer is not None else None,
        mixtures=len(fewer.mixtures.each) if fewer is not None else 0,
        dropped=dropped,
        model_sparsity=(zeros + dropped) / (parameters + dropped),
        dense=left_dense(blocks, pruned),
        checkpoint_bytes=size,
        disk_bytes=disk,
        ranks=ranks,
        sequences=sequences,
        traffic_bytes=dict(sent),
        activation_bytes=max(sum(streams), sum(surveyed)),
        activation_places=places,
        memory_bytes=needs,
        gpu_memory_bytes=gpu,
        distilling_bytes=distilling,
        forward_passes=forward_passes(recipe, samples, seqlen, batch, ranks, routed, head_share(model, blocks)),
        writing_passes=own * PASSES,
        fits=not lacking,
        lacking=lacking,
        warnings=list(_warnings(recipe, samples, seqlen, max(widths, default=0))),
    )


def _structures(
    in_order: list[Unit], budgets_of_units: list[list[Budget]], recipe: Recipe
) -> dict[str, tuple[int, int]]:
    """Of structures that go whole, how many all blocks have and how many stay, by kind."""
    had, stay = Counter[str](), Counter[str]()
    for unit, unit_budgets in zip(in_order, budgets_of_units, strict=True):
        for block, budget in zip(unit.blocks, unit_budgets, strict=False):
            counts = recipe.allocation.kept(block, budget)
            had.update({kind: before for kind, (before, _) in counts.items()})
            stay.update({kind: after for kind, (_, after) in counts.items()})
    return {kind: (had[kind], stay[kind]) for kind in had}


def _warnings(recipe: Recipe, samples: int, seqlen: int, widest: int) -> Iterator[str]:
    """What could cost quality, given the most inputs that a pruned matrix has."""
    tokens = samples * seqlen
    if recipe.needs_gram and tokens < ENOUGH * widest:
        yield (
            f"{tokens:,} calibration tokens are few for inputs of {widest:,} columns, and solving for weights may fit "
            f"these tokens only: give at least {ENOUGH} tokens for each column, such as --samples "
            f"{-(-ENOUGH * widest // seqlen):,}."
        )


def _lacking(needs: int, gpu: int | None, disk: int, device: torch.device, folder: Path, ranks: int) -> Iterator[str]:
    """What this machine has too little of for so many processes, which need so much together, in words."""
    if needs > memory.total_bytes():
        yield f"memory ({memory.total_bytes() / 1e9:.1f} GB)"
    if gpu is not None:
        if not is_available(device.type):
            yield "GPU memory (there is none)"
        elif ranks > (present := torch.get_device_module(device).device_count()):
            yield f"GPU memory (one GPU for each of {ranks} ranks; there {'is' if present == 1 else 'are'} {present})"
        elif gpu > (total := total_bytes(device)):
            yield f"GPU memory ({total / 1e9:.1f} GB)"
    place = next(parent for parent in [folder, *folder.absolute().parents] if parent.is_dir())
    if disk > (free := shutil.disk_usage(place).free):
        yield f"free disk ({free / 1e9:.1f} GB)"


def _placed(sizes: list[int], room: Room) -> Counter[Place]:
    """Bytes of hidden states of these sizes in each place, if they are allocated in this order."""
    placed: Counter[Place] = Counter()
    for size in sizes:
        place, taken = room.take(size)
        placed[place] += taken or size
    return placed


def _distinct(in_order: list[Unit], budgets_of_units: list[list[Budget]]) -> list[tuple[Unit, list[Budget]]]:
    """One unit of each shape, and its budgets; most decoders have only one shape."""
    by_shapes = {
        tuple((p.rows, p.columns) for p in unit.prunables.values()): (unit, unit_budgets)
        for unit, unit_budgets in reversed(list(zip(in_order, budgets_of_units, strict=True)))
    }
    return list(by_shapes.values())


def _code_bytes(quantization: Coding, blocks: list[Block], names: set[str], item: int) -> int:
    """Bytes of the quantised linears as codes, with scales and zero points."""
    bits = 0
    for block in blocks:
        for name, prunable in block.prunables.items():
            if name in names:
                grids = prunable.rows * quantization.groups(name, prunable.columns)
                bits += quantization.bits * (prunable.numel + grids) + 8 * item * grids
    return bits // 8
