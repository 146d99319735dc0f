"""A decoder as a list of blocks: found in the module tree, fed without the rest of the model.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from besa.errors import BesaError


@dataclass(frozen=True)
class Block:
    """One decoder block and the arguments, besides the hidden states, that the model calls it with.

    Attributes:
        index: position in the decoder, from 0.
        name: module path in the model, such as ``model.layers.3``.
        module: the block itself.
        linears: its prunable linears by full module path, in module order.
        arguments: keyword arguments of its call by batch size (masks, positions, rotary embeddings).
    """

    index: int
    name: str
    module: nn.Module
    linears: dict[str, nn.Linear]
    arguments: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Number of prunable weights."""
        return sum(linear.weight.numel() for linear in self.linears.values())

    def __call__(self, x_NTC: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Output (N, T, C) of the block for hidden states (N, T, C).

        Args:
            x_NTC: input on the block's device.
            weights: weights by full name of their linear, to be used instead of the block's own; gradients reach them.
        """
        arguments = {key: _moved(value, x_NTC.device) for key, value in self.arguments[x_NTC.shape[0]].items()}
        if weights is None:
            output: Any = self.module(x_NTC, **arguments)
        else:
            replaced = {f"{name.removeprefix(self.name + '.')}.weight": weight for name, weight in weights.items()}
            output = functional_call(self.module, replaced, (x_NTC,), arguments)
        y_NTC: Tensor = output[0] if isinstance(output, tuple) else output
        return y_NTC

    @torch.no_grad()
    def run(self, x_NTC: Tensor, batch: int) -> Tensor:
        """Outputs of all sequences (N, T, C), `batch` at a time on the block's device, returned where `x_NTC` lives."""
        device = next(self.module.parameters()).device
        y_NTC = torch.empty_like(x_NTC)
        for part_NTC, result_NTC in zip(x_NTC.split(batch), y_NTC.split(batch), strict=True):
            result_NTC.copy_(self(part_NTC.to(device)))
        return y_NTC


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    return value


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """The decoder blocks of a causal language model, from its module tree.

    Raises:
        BesaError: no list of decoder blocks is found, or a block has no linear to prune.
    """
    depth = getattr(model.config, "num_hidden_layers", None)
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not stacks:
        raise BesaError(
            f"{type(model).__name__} has no stack of decoder blocks that besa can find: use a causal decoder."
        )
    path, stack = max(stacks, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))
    blocks = []
    for index, module in enumerate(stack):
        name = f"{path}.{index}"
        linears = {f"{name}.{sub}": part for sub, part in module.named_modules() if isinstance(part, nn.Linear)}
        if not linears:
            raise BesaError(f"{name} of {type(model).__name__} has no linear weights to prune.")
        blocks.append(Block(index, name, module, linears))
    return blocks


@torch.no_grad()
def capture_inputs(model: PreTrainedModel, blocks: list[Block], tokens_NT: Tensor, batch: int) -> Tensor:
    """Input of the first block (N, T, C) for the token ids (N, T); fills in the call arguments of every block.

    The model runs with its blocks standing aside (each hands its input on unchanged): this costs the embeddings only.
    Arguments are kept for every batch size up to `batch`, as masks and position biases may depend on it.
    """
    hidden: list[Tensor] = []
    tuples = _tuple_blocks(model, blocks, tokens_NT[:1, :2])
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_standing_aside(block, hidden, tuples))
        for size in range(1, min(batch, len(tokens_NT)) + 1):
            model.base_model(input_ids=tokens_NT[:size].to(model.device), use_cache=False)
        hidden.clear()
        for part_NT in tokens_NT.split(batch):
            model.base_model(input_ids=part_NT.to(model.device), use_cache=False)
    return torch.cat(hidden)


def _tuple_blocks(model: PreTrainedModel, blocks: list[Block], tokens_NT: Tensor) -> set[int]:
    """Which blocks return a tuple (Falcon's, Bloom's), seen in a forward pass of a token or two."""
    tuples: set[int] = set()

    def look(index: int, output: Any) -> None:
        if isinstance(output, tuple):
            tuples.add(index)

    with ExitStack() as stack:
        for block in blocks:
            handle = block.module.register_forward_hook(lambda _, __, output, index=block.index: look(index, output))
            stack.callback(handle.remove)
        model.base_model(input_ids=tokens_NT.to(model.device), use_cache=False)
    return tuples


@contextmanager
def _standing_aside(block: Block, hidden: list[Tensor], tuples: set[int]) -> Iterator[None]:
    """While open, calls of the block return their input and leave their arguments in the block."""

    def record(_: nn.Module, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        x_NTC = inputs[0] if inputs else arguments["hidden_states"]
        if block.index == 0:
            hidden.append(x_NTC)
        kept = {key: value for key, value in arguments.items() if key != "hidden_states"}
        block.arguments[x_NTC.shape[0]] = kept

    def pass_on(*inputs: Any, **arguments: Any) -> Any:
        x_NTC = inputs[0] if inputs else arguments["hidden_states"]
        return (x_NTC,) if block.index in tuples else x_NTC

    handle = block.module.register_forward_pre_hook(record, with_kwargs=True)
    before = vars(block.module).get("forward")  # accelerate sets one of its own
    block.module.forward = pass_on
    try:
        yield
    finally:
        handle.remove()
        del block.module.forward  # the class's own forward shows again
        if before is not None:
            block.module.forward = before
