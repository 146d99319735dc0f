"""What a run will take, said beforehand from the configuration alone.

Weights and hidden states are counted; what a block's forward and backward pass keep alive is counted too, on the meta
device, where tensors have shapes and no memory.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from besa import memory
from besa.allocation import Allocation, Sensitivity, first_tokens
from besa.allocation.besa import Besa
from besa.checkpoint.writer import disk_bytes
from besa.finetuning import MaskedAdam
from besa.masks import CHUNK
from besa.models.blocks import Block, standing_aside
from besa.models.units import Unit, units
from besa.pruning.paths import dense_share
from besa.quantization import MinMax
from besa.recipe import Recipe
from besa.reconstruction import ADMM, ConjugateGradient
from besa.targets import LossSensitivity, Owl
from besa.targets.budgets import budgets

TEXT = 64 << 20  # of the tokenizer and the calibration text, while they are read
OPTIMIZER = 7  # copies of the logits: themselves, gradient, two moments, beta, its gradient, the tails


class Plan(BaseModel):
    """What a run will take; bytes unless said otherwise.

    Attributes:
        model: its name.
        architecture: class of the model.
        blocks: how many.
        parameters: of the whole model.
        prunable_weights: of the blocks, less what is skipped.
        zeros: what the recipe will make of them.
        checkpoint_bytes: of the pruned checkpoint.
        disk_bytes: free space needed while the run goes on: journal, checkpoint and activations.
        activation_bytes: of all hidden states kept between blocks.
        activations_on_disk: whether they exceed the activation budget.
        memory_bytes: expected peak of the process.
        gpu_memory_bytes: expected peak on the GPU, None for a run on the CPU.
        forward_passes: of the calibration set through all blocks; a backward pass counts as two.
        fits: whether memory and disk here suffice; the GPU's too, where there is one.
        lacking: what does not suffice, in words.
    """

    model: str
    architecture: str
    blocks: int
    parameters: int
    prunable_weights: int
    zeros: int
    checkpoint_bytes: int
    disk_bytes: int
    activation_bytes: int
    activations_on_disk: bool
    memory_bytes: int
    gpu_memory_bytes: int | None
    forward_passes: float
    fits: bool
    lacking: list[str]


def work_out(
    name: str,
    model: PreTrainedModel,
    blocks: list[Block],
    recipe: Recipe,
    *,
    samples: int,
    seqlen: int,
    batch: int,
    device: torch.device,
    activation_budget: int,
    folder: Path,
) -> Plan:
    """Work out a run.

    Args:
        name: what the user calls the model.
        model: a skeleton, its parameters on the meta device, in the dtype of the run.
        blocks: of the model.
        recipe: what is to be done.
        samples: calibration sequences.
        seqlen: tokens of a calibration sequence.
        batch: sequences in a forward pass.
        device: where blocks would be computed; need not be here.
        activation_budget: bytes of hidden states kept in memory.
        folder: where the checkpoint would be written.

    Raises:
        BesaError: a pattern of the recipe matches nothing.
    """
    whole, parts = units(blocks, recipe.granularity), [budget for own in budgets(blocks, recipe) for budget in own]
    parameters, item = model.num_parameters(), model.dtype.itemsize
    size = parameters * item
    if isinstance(recipe.quantization, MinMax):
        names = {name for part in parts for name in part.names}
        size += _packed_bytes(recipe.quantization, blocks, names, item) - item * sum(part.weights for part in parts)
    stream = samples * seqlen * model.config.get_text_config().hidden_size * item
    teacher, descent = recipe.teacher, recipe.descent
    share, tokens = dense_share(recipe, seqlen)
    dense_stream = stream // seqlen * tokens // samples * -(-samples // share)
    apart = recipe.granularity == "attn-mlp"  # attention has a teacher of its own, and steps of its own
    target = stream if teacher == "pruned" else dense_stream
    streams = stream + dense_stream + (stream if teacher == "pruned" else 0) + (target if apart else 0)
    if isinstance(recipe.targets, LossSensitivity):  # before the others are there
        streams = max(streams, stream // samples * -(-samples // recipe.targets.every) * (len(blocks) + 1))
    on_disk = stream > activation_budget // 2
    crop = first_tokens(seqlen, descent.crop if descent else 1.0)
    _learn_arguments(model, blocks, {(batch, seqlen), (1, seqlen), (1, crop)})
    inside = {id(parameter) for block in blocks for parameter in block.module.parameters()}
    outside = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in inside)
    work = max(_unit_bytes(model, unit, recipe, batch, seqlen) for unit in _distinct(whole))
    unit_size = max(_stored(unit) for unit in whole)
    kept = (0 if on_disk else streams) + memory.current_bytes() + TEXT
    on_gpu = device.type == "cuda"
    needs = kept + max(outside, 2 * unit_size if on_gpu else work)
    disk = disk_bytes(size) + (streams if on_disk else 0)
    learning = 3 * (1 + apart) * descent.steps * crop / (samples * seqlen) if descent else 0
    learning += _passes(recipe)
    dense = dense_stream / stream
    gpu = work if on_gpu else None
    lacking = list(_lacking(needs, gpu, disk, device, folder))
    return Plan(
        model=name,
        architecture=type(model).__name__,
        blocks=len(blocks),
        parameters=parameters,
        prunable_weights=sum(part.weights for part in parts),
        zeros=sum(part.zeros for part in parts),
        checkpoint_bytes=size,
        disk_bytes=disk,
        activation_bytes=streams,
        activations_on_disk=on_disk,
        memory_bytes=needs,
        gpu_memory_bytes=gpu,
        forward_passes=dense + 2 + learning + (target / stream if apart else 0),
        fits=not lacking,
        lacking=lacking,
    )


def _passes(recipe: Recipe) -> float:
    """Forward passes of what is found by sending gradients back, besides the descent.

    Where they go to activations and not to weights, a backward pass counts as one.
    """
    passes = 0.0
    if isinstance(recipe.targets, Owl):
        passes += 1 / recipe.targets.every
    if isinstance(recipe.targets, LossSensitivity):
        passes += 3 / recipe.targets.every
    if isinstance(recipe.allocation, Sensitivity):
        passes += 2 / recipe.allocation.every
    if isinstance(recipe.finetune, MaskedAdam):
        held = 1 / recipe.finetune.held_out
        passes += recipe.finetune.epochs * (3 * (1 - held) + held) + held
    return passes


def _lacking(needs: int, gpu: int | None, disk: int, device: torch.device, folder: Path) -> Iterator[str]:
    """What this machine has too little of."""
    if needs > memory.total_bytes():
        yield f"memory ({memory.total_bytes() / 1e9:.1f} GB)"
    if gpu is not None:
        if not torch.cuda.is_available():
            yield "a GPU"
        elif gpu > (total := torch.cuda.get_device_properties(device).total_memory):
            yield f"GPU memory ({total / 1e9:.1f} GB)"
    place = next(parent for parent in [folder, *folder.absolute().parents] if parent.is_dir())
    if disk > (free := shutil.disk_usage(place).free):
        yield f"free disk ({free / 1e9:.1f} GB)"


def _distinct(whole: list[Unit]) -> list[Unit]:
    """One unit of each shape: most decoders repeat one."""
    found = {tuple((p.rows, p.columns) for p in unit.prunables.values()): unit for unit in reversed(whole)}
    return list(found.values())


def _stored(unit: Unit) -> int:
    """Bytes of a unit's parameters."""
    return sum(parameter.nbytes for block in unit.blocks for parameter in block.module.parameters())


def _unit_bytes(model: PreTrainedModel, unit: Unit, recipe: Recipe, batch: int, seqlen: int) -> int:
    """Peak while a unit is pruned: its weights, and the largest of what its phases add."""
    item = model.dtype.itemsize
    sizes = [prunable.numel for prunable in unit.prunables.values()]
    widest = max(prunable.columns for prunable in unit.prunables.values())
    weights, most = sum(sizes), max(sizes)
    stored = _stored(unit)
    read = stored // len(unit.blocks)  # each tensor is copied out of its file before it becomes a parameter
    watched = batch * seqlen * widest * 8  # a product's input as float32, and its squares
    statistics = _forward_bytes(unit, model, batch, seqlen, learning=False) + watched
    gram = 4 * sum(columns**2 for columns in {p.columns for p in unit.prunables.values()}) if recipe.needs_gram else 0
    ranked = 4 * weights + (2 if widest < 1 << 15 else 4) * weights  # importance and ranks, kept together
    whole = most if getattr(recipe.allocation, "per", "row") == "linear" else CHUNK  # weights sorted at once
    ranking = ranked + 12 * most + 32 * min(whole, most)
    if recipe.reconstruction.needs_cross:
        widths = sum(prunable.columns for prunable in unit.prunables.values())
        statistics += batch * seqlen * widths * item  # inputs of the dense path, until the pruned path's come
        gram *= 2
    phases = [read, statistics + gram, ranking + gram]
    if recipe.descent is not None:
        quantized = isinstance(recipe.quantization, MinMax)
        changing = item * (weights + most) + (2 * weights if model.dtype == torch.float32 else 0)  # a copy in bfloat16
        changing += item * weights + 16 * most if quantized else 0  # Q(W), and the slopes of its steps
        learning = _forward_bytes(unit, model, 1, first_tokens(seqlen, recipe.descent.crop), learning=True)
        phases.append(ranked + changing + _rates_bytes(recipe.allocation, unit) + learning)
    if isinstance(recipe.quantization, MinMax):
        phases.append(ranked + weights + 16 * most)  # codes
    if recipe.reconstruction.needs_gram:
        solver = {ADMM: 44, ConjugateGradient: 32}.get(type(recipe.reconstruction), 12)  # copies of a weight, in bytes
        phases.append(ranked + gram + 4 * 4 * widest**2 + solver * most)
    if isinstance(recipe.allocation, Sensitivity) or isinstance(recipe.targets, LossSensitivity):
        phases.append(ranked + 12 * most + _forward_bytes(unit, model, 1, seqlen, learning=True))
    if isinstance(recipe.finetune, MaskedAdam):
        # Weights, gradient, two moments and the best so far as float32, the mask, copies to multiply with.
        tuned = (21 + item + 2) * weights
        phases.append(ranked + tuned + _forward_bytes(unit, model, 1, seqlen, learning=True))
    phases.append(ranked + stored + 12 * most)  # the record and the journal
    return stored + max(phases)


def _rates_bytes(allocation: Allocation, unit: Unit) -> int:
    """Of what the coefficients of a unit take while they are learned."""
    if not isinstance(allocation, Besa):
        return 0
    rows = sum(prunable.rows for prunable in unit.prunables.values())
    groups = rows if allocation.rates == "row" else len(unit.prunables)
    return 4 * round(1 / allocation.candidate_step) * (OPTIMIZER * groups + rows)


def _packed_bytes(quantization: MinMax, blocks: list[Block], names: set[str], item: int) -> int:
    """Of the quantised linears: codes, scales and zero points."""
    bits = 0
    for block in blocks:
        for name, prunable in block.prunables.items():
            if name in names:
                grids = prunable.rows * quantization.groups(name, prunable.columns)
                bits += quantization.bits * (prunable.numel + grids) + 8 * item * grids
    return bits // 8


def _forward_bytes(unit: Unit, model: PreTrainedModel, batch: int, seqlen: int, learning: bool) -> int:
    """Peak of what a forward pass keeps alive, with the backward pass to its weights when `learning`."""
    channels: int = model.config.get_text_config().hidden_size
    x_NTC = torch.empty(batch, seqlen, channels, dtype=model.dtype, device="meta")
    weights = {
        name: torch.empty(prunable.rows, prunable.columns, dtype=model.dtype, device="meta").requires_grad_(learning)
        for name, prunable in unit.prunables.items()
    }
    for weight in weights.values():
        if learning:
            weight.register_post_accumulate_grad_hook(_dropped)
    live = _LiveBytes()
    try:
        with _lean_attention(), _stacks_aside(unit), torch.set_grad_enabled(learning), live:
            y_NTC = unit(x_NTC, weights)
            if learning:
                (y_NTC.float() - x_NTC.float()).square().sum().backward()
    except (RuntimeError, NotImplementedError, TypeError, ValueError):  # blocks that compute with values
        wide = sum({prunable.parameter: prunable.rows for prunable in unit.prunables.values()}.values())
        return batch * seqlen * (12 * channels + (3 if learning else 1) * wide) * 4
    peak: int = live.peak
    return peak


def _dropped(weight: Tensor) -> None:
    weight.grad = None


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that appear while it is open and are still there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves(args) if isinstance(tensor, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known | given:
                    self._known.add(storage._cdata)
                    self._live += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._live)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


class _Attention(torch.autograd.Function):
    """What a fused attention kernel keeps: its inputs and its output, never the scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextmanager
def _lean_attention() -> Iterator[None]:
    """While open, attention is computed (on the meta device) as fused kernels do."""
    before = functional.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]

    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before


@contextmanager
def _stacks_aside(unit: Unit) -> Iterator[None]:
    """While open, mixtures hand their tokens on: which expert gets which is not known without values."""
    modules = [module for block in unit.blocks for module in block.module.modules()]
    holders = [module for module in modules if any(p.dim() == 3 for p in module.parameters(recurse=False))]
    for module in holders:
        module.forward = lambda hidden, *_, **__: torch.empty_like(hidden)
    try:
        yield
    finally:
        for module in holders:
            del module.forward


@torch.no_grad()
def _learn_arguments(model: PreTrainedModel, blocks: list[Block], sizes: set[tuple[int, int]]) -> None:
    """Fill in the call arguments of every block, for sizes of (sequences, tokens), without any weight of the model."""
    embeddings = model.get_input_embeddings()
    within = {module for block in blocks for module in block.module.modules()}
    for module in model.base_model.modules():
        if (
            module not in within
            and module is not embeddings
            and next(module.parameters(recurse=False), None) is not None
        ):
            module.to_empty(device="cpu", recurse=False)
    with standing_aside(blocks):
        for samples, tokens in sizes:
            x_NTC = torch.zeros(samples, tokens, embeddings.weight.shape[1], dtype=model.dtype)
            model.base_model(inputs_embeds=x_NTC, use_cache=False)
