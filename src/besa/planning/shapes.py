"""Memory of a forward and backward pass, and which matrices share an input, found on the meta device.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from besa.errors import BesaError
from besa.models.aside import standing_aside
from besa.models.blocks import Block
from besa.models.calls import ElsewhereError
from besa.models.sizes import channels
from besa.models.units import Unit

VALUES_NEEDED = (RuntimeError, NotImplementedError, TypeError, ValueError)  # of a block for which shapes are not enough


def forward_bytes(unit: Unit, model: PreTrainedModel, batch: int, seqlen: int, learning: bool) -> int:
    """Peak bytes of the tensors of a forward pass; if `learning`, with the backward pass to the weights.

    Args:
        unit: on the meta device.
        model: of the unit.
        batch: sequences.
        seqlen: tokens of each.
        learning: whether to run the backward pass too.

    Raises:
        BesaError: a block needs values that another block left behind.
    """
    x_NTC = torch.empty(batch, seqlen, channels(model), dtype=model.dtype, device="meta")
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
    except ElsewhereError as error:
        raise BesaError(
            f"{type(model).__name__} cannot be pruned block by block: {unit.blocks[0].name} needs what other blocks "
            f"left behind ({error.args[0]!r})."
        ) from error
    except VALUES_NEEDED:
        wide = sum({prunable.parameter: prunable.rows for prunable in unit.prunables.values()}.values())
        return batch * seqlen * (12 * channels(model) + (3 if learning else 1) * wide) * 4
    peak: int = live.peak
    return peak


@torch.no_grad()
def shared_inputs(unit: Unit, model: PreTrainedModel, seqlen: int) -> list[tuple[str, ...]]:
    """The names of the matrices of a unit, grouped by the input that they share, as `InputStatistics` are.

    Where modules do not say it, as those of experts, each matrix counts as one with an input of its own.

    Args:
        unit: on the meta device.
        model: of the unit.
        seqlen: tokens of a sequence.
    """
    groups: list[list[str]] = []
    unseen = dict.fromkeys(unit.prunables)
    last: Any = None

    def see(name: str, x: Any) -> None:
        nonlocal last
        if name in unseen:
            del unseen[name]
            if x is last:
                groups[-1].append(name)
            else:
                groups.append([name])
        last = x

    with ExitStack() as stack:
        for block in unit.blocks:
            for name, prunable in block.prunables.items():
                if prunable.expert is None:
                    module = block.module.get_submodule(prunable.parameter.rpartition(".")[0])
                    hook = module.register_forward_pre_hook(lambda _, inputs, name=name: see(name, *inputs[:1]))
                    stack.callback(hook.remove)
        stack.enter_context(_lean_attention())
        stack.enter_context(_stacks_aside(unit))
        stack.enter_context(suppress(ElsewhereError, *VALUES_NEEDED))
        unit(torch.empty(1, seqlen, channels(model), dtype=model.dtype, device="meta"))
    return [*(tuple(names) for names in groups), *((name,) for name in unseen)]


@torch.no_grad()
def learn_arguments(model: PreTrainedModel, blocks: list[Block], sizes: set[tuple[int, int]]) -> None:
    """Record the call arguments of every block, for each size (sequences, tokens), without weights of the model.

    Raises:
        BesaError: the model cannot run with its blocks standing aside, leaves out blocks, or its hidden states are not
            one vector for each token.
    """
    embeddings = model.get_input_embeddings()
    within = {module for block in blocks for module in block.module.modules()}
    for module in model.base_model.modules():
        if (
            module not in within
            and module is not embeddings
            and next(module.parameters(recurse=False), None) is not None
        ):
            module.to_empty(device="cpu", recurse=False)
    with standing_aside(blocks), _embedding_zeros(embeddings, model.dtype):
        for samples, tokens in sizes:
            try:
                model.base_model(input_ids=torch.zeros(samples, tokens, dtype=torch.int64), use_cache=False)
            except Exception as error:  # model code may raise anything
                reason = " ".join(str(error).split()).rstrip(".")[:200]
                raise BesaError(
                    f"{type(model).__name__} cannot be pruned block by block: it cannot be run with its blocks aside "
                    f"({type(error).__name__}: {reason})."
                ) from error
            if any((samples, tokens) not in block.arguments for block in blocks):
                raise BesaError(
                    f"{type(model).__name__} cannot be pruned block by block: its hidden states are not one vector for "
                    "each token, or it leaves out blocks."
                )


@contextmanager
def _embedding_zeros(embeddings: Any, dtype: torch.dtype) -> Iterator[None]:
    """While open, every token is embedded as zeros, so that no weights are needed."""
    width = embeddings.weight.shape[1]
    embeddings.forward = lambda tokens, *_, **__: torch.zeros(*tokens.shape, width, dtype=dtype)
    try:
        yield
    finally:
        del embeddings.forward


def _dropped(weight: Tensor) -> None:
    weight.grad = None


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is open and are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        inputs = {tensor.untyped_storage()._cdata for tensor in tree_leaves(args) if isinstance(tensor, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known | inputs:
                    self._known.add(storage._cdata)
                    self._live += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._live)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


class _Attention(torch.autograd.Function):
    """Attention that keeps what a fused kernel keeps: inputs and output, not the scores."""

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
    """While open, attention (on the meta device) keeps as little as fused kernels do."""
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
    """While open, mixtures of experts return their inputs, because routing needs values."""
    modules = [module for block in unit.blocks for module in block.module.modules()]
    holders = [module for module in modules if any(p.dim() == 3 for p in module.parameters(recurse=False))]
    for module in holders:
        module.forward = lambda hidden, *_, **__: torch.empty_like(hidden)
    try:
        yield
    finally:
        for module in holders:
            del module.forward
