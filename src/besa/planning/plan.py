"""What a run needs, computed beforehand from the model's configuration alone."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from pydantic import BaseModel

from besa.models.activations import Place
from besa.models.finding import left_dense
from besa.models.whole import head_share
from besa.planning.distinct import Distinct, distinct_units
from besa.planning.enough import few_tokens
from besa.planning.outline import Outline
from besa.planning.passes import forward_passes
from besa.planning.process import Peaks, peaks
from besa.planning.states import kept_states
from besa.planning.traffic import traffic
from besa.planning.whole import coded_bytes, whole_disk_bytes
from besa.runtime.own_text import PASSES
from besa.storage.names import nearest
from besa.system import memory
from besa.system.devices import is_available, total_bytes


class Plan(BaseModel):
    """What a run needs. With several ranks, hidden states, memory and passes are those of the rank with the most.

    Attributes:
        model: its name.
        architecture: class of the model.
        blocks: number of blocks.
        parameters: number of parameters of the whole model.
        prunable_weights: number of weights to prune: those of the blocks' matrices that stay and are not skipped.
        zeros: how many of these become zero.
        structures: of structures that are pruned whole, how many all blocks have and how many stay, by kind.
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
        minutes: time of the run that decides the number of distillation epochs; the passes are of the recipe's number.
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
    minutes: float | None = None
    writing_passes: float = 0.0
    fits: bool
    lacking: list[str]
    warnings: list[str] = []


def work_out(run: Outline) -> Plan:
    """Work out what a run needs.

    Raises:
        BesaError: a pattern of the recipe matches nothing, or one batch needs more than the memory of this machine.
    """
    recipe, fewer = run.recipe, run.fewer
    zeros = sum(budget.zeros for budget in run.budgets)
    checkpoint = _checkpoint_bytes(run)
    states = kept_states(run)
    distinct = distinct_units(run)
    peak = peaks(run, states, distinct)
    disk = whole_disk_bytes(run.model, run.blocks, recipe, checkpoint) + run.ranks * states.places["file"]
    lacking = list(_lacking(run, peak, disk))
    head = head_share(run.model, run.blocks)
    return Plan(
        model=run.name,
        architecture=type(run.model).__name__,
        blocks=len(run.blocks),
        parameters=run.parameters + run.dropped,
        prunable_weights=sum(budget.weights for budget in run.budgets),
        zeros=zeros,
        structures=_structures(run),
        experts=(fewer.mixtures.experts, fewer.kept) if fewer is not None else None,
        mixtures=len(fewer.mixtures.each) if fewer is not None else 0,
        dropped=run.dropped,
        model_sparsity=(zeros + run.dropped) / (run.parameters + run.dropped),
        dense=left_dense(run.blocks, run.pruned),
        checkpoint_bytes=checkpoint,
        disk_bytes=disk,
        ranks=run.ranks,
        sequences=run.sequences,
        traffic_bytes=_sent(run, distinct),
        activation_bytes=states.size,
        activation_places=states.places,
        memory_bytes=peak.memory,
        gpu_memory_bytes=peak.gpu,
        distilling_bytes=peak.distilling,
        forward_passes=forward_passes(recipe, run.samples, run.seqlen, run.batch, run.ranks, run.routed, head),
        minutes=recipe.distill.time_budget,
        writing_passes=run.own * PASSES,
        fits=not lacking,
        lacking=lacking,
        warnings=few_tokens(run.recipe, run.blocks, run.pruned, run.samples, run.seqlen),
    )


def _checkpoint_bytes(run: Outline) -> int:
    """Bytes of the pruned checkpoint."""
    size, coding = run.parameters * run.item, None if run.dequantized else run.recipe.quantization.coding
    return size if coding is None else coded_bytes(size, run.item, run.blocks, run.pruned, coding)


def _structures(run: Outline) -> dict[str, tuple[int, int]]:
    """Structures that are pruned whole: how many all blocks have and how many stay, by kind."""
    had, stay = Counter[str](), Counter[str]()
    for unit, unit_budgets in zip(run.units, run.budgets_of_units, strict=True):
        for block, budget in zip(unit.blocks, unit_budgets, strict=False):
            counts = run.recipe.allocation.kept(block, budget)
            had.update({kind: before for kind, (before, _) in counts.items()})
            stay.update({kind: after for kind, (_, after) in counts.items()})
    return {kind: (had[kind], stay[kind]) for kind in had}


def _sent(run: Outline, distinct: Sequence[Distinct]) -> dict[str, int]:
    """Bytes that a rank sends to others by phase, for the block for which it sends most."""
    most = Counter[str]()
    for each in distinct:
        of_unit = traffic(each.unit, each.inputs, each.budgets, run.recipe, run.samples, run.channels, run.ranks)
        of_block = Counter({phase: size // len(each.unit.blocks) for phase, size in of_unit.items()})
        most = max(most, of_block, key=Counter.total)
    return dict(most)


def _lacking(run: Outline, peak: Peaks, disk: int) -> Iterator[str]:
    """What this machine has too little of, in words, for a run that needs so many bytes on the disk."""
    if peak.memory_of_all > memory.total_bytes():
        yield f"memory ({memory.total_bytes() / 1e9:.1f} GB)"
    if peak.gpu is not None:
        if not is_available(run.device):
            yield "GPU memory (there is none)"
        elif run.ranks > (there := torch.get_device_module(run.device).device_count()):
            yield f"GPU memory (one GPU for each of {run.ranks} ranks; there {'is' if there == 1 else 'are'} {there})"
        elif peak.gpu > (total := total_bytes(run.device)):
            yield f"GPU memory ({total / 1e9:.1f} GB)"
    if disk > (free := shutil.disk_usage(nearest(run.folder)).free):
        yield f"free disk ({free / 1e9:.1f} GB)"
