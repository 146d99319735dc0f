"""A decoder as a list of blocks: found in the module tree, fed without the rest of the model.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from besa.activations import HiddenStates
from besa.errors import BesaError
from besa.models.prunable import Prunable, find_prunables, replaced


@dataclass(frozen=True)
class Block:
    """One decoder block and the arguments, besides the hidden states, that the model calls it with.

    Attributes:
        index: position in the decoder, from 0.
        name: module path in the model, such as ``model.layers.3``.
        module: the block itself.
        prunables: its prunable matrices by full module path, in module order.
        arguments: keyword arguments of its call by number of sequences and of tokens (masks, rotary embeddings).
    """

    index: int
    name: str
    module: nn.Module
    prunables: dict[str, Prunable]
    arguments: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Number of prunable weights."""
        return sum(prunable.numel for prunable in self.prunables.values())

    def weight(self, name: str) -> Tensor:
        """The prunable matrix (O, I) of that name, as a view of what the block holds now."""
        prunable = self.prunables[name]
        return prunable.of(self.module.get_parameter(prunable.parameter))

    def __call__(self, x_NTC: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Output (N, T, C) of the block for hidden states (N, T, C).

        Args:
            x_NTC: input on the block's device.
            weights: matrices by full name, to be used instead of the block's own; gradients reach them.
        """
        captured = self.arguments[x_NTC.shape[0], x_NTC.shape[1]]
        arguments = {key: _moved(value, x_NTC.device) for key, value in captured.items()}
        if weights is None:
            output: Any = self.module(x_NTC, **arguments)
        else:
            parameters = replaced(dict(self.module.named_parameters()), self.prunables, weights)
            output = functional_call(self.module, parameters, (x_NTC,), arguments)
        y_NTC: Tensor = output[0] if isinstance(output, tuple) else output
        return y_NTC

    def run(self, x_NTC: HiddenStates, batch: int, into: HiddenStates | None = None) -> None:
        """Send all sequences through the block, `batch` at a time on the block's device.

        Args:
            x_NTC: inputs (N, T, C); may live elsewhere.
            batch: sequences in a forward pass.
            into: where the outputs go, which may be where the inputs are; None throws them away.

        Raises:
            BesaError: an output is NaN or infinite.
        """
        send(self, self.name, x_NTC, batch, next(self.module.parameters()).device, into)


@torch.no_grad()
def send(
    function: Callable[[Tensor], Tensor],
    name: str,
    x_NTC: HiddenStates,
    batch: int,
    device: torch.device,
    into: HiddenStates | None,
) -> None:
    """Send all sequences through a function; see `Block.run`.

    Args:
        function: of hidden states (N, T, C).
        name: what to call it.
        x_NTC: inputs (N, T, C); may live elsewhere.
        batch: sequences in a forward pass.
        device: of the function.
        into: where the outputs go, which may be where the inputs are; None throws them away.

    Raises:
        BesaError: an output is NaN or infinite.
    """
    for start in range(0, len(x_NTC), batch):
        part = slice(start, start + batch)
        y_NTC = function(x_NTC[part].to(device))
        if not bool(y_NTC.isfinite().all()):
            raise BesaError(
                f"{name} puts out NaN or infinity: try --dtype float32, and check the model with `besa eval`."
            )
        if into is not None:
            into[part] = y_NTC


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    return value


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """The decoder blocks of a causal language model, from its module tree.

    Raises:
        BesaError: no list of decoder blocks is found, or a block has no matrix to prune.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not stacks or not depth:
        raise BesaError(
            f"{type(model).__name__} has no stack of decoder blocks that besa can find: use a causal decoder."
        )
    path, stack = max(stacks, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))
    blocks = []
    for index, module in enumerate(stack):
        name = f"{path}.{index}"
        prunables = {f"{name}.{inner}": prunable for inner, prunable in find_prunables(module).items()}
        if not prunables:
            raise BesaError(f"{name} of {type(model).__name__} has no linear weights to prune.")
        blocks.append(Block(index, name, module, prunables))
    return blocks


@torch.no_grad()
def capture_inputs(
    model: PreTrainedModel, blocks: list[Block], tokens_NT: Tensor, batch: int, lengths: Collection[int] = ()
) -> Iterator[Tensor]:
    """Inputs of the first block (up to `batch`, T, C) for the token ids (N, T), in their order.

    The model runs with its blocks standing aside (each hands its input on unchanged): this costs the embeddings only,
    and the blocks' own weights may be absent. Before the first part comes out, the call arguments of every block are
    filled in, for every batch size up to `batch`, as masks and position biases may depend on it: for sequences of T
    tokens, and for their beginnings of the `lengths` asked for.
    """
    with standing_aside(blocks) as hidden:
        for size in range(1, min(batch, len(tokens_NT)) + 1):
            for length in {tokens_NT.shape[1], *lengths}:
                model.base_model(input_ids=tokens_NT[:size, :length].to(model.device), use_cache=False)
        hidden.clear()
        for part_NT in tokens_NT.split(batch):
            model.base_model(input_ids=part_NT.to(model.device), use_cache=False)
            yield hidden.pop()


def logits_of(model: PreTrainedModel, blocks: list[Block], tokens_NT: Tensor, y_NTC: Tensor) -> Tensor:
    """What the model predicts (N, T, V) where its last block puts out `y_NTC`; gradients reach that.

    The blocks stand aside: their weights may be absent, all others are used.
    """
    with standing_aside(blocks):
        blocks[-1].module.forward = lambda *_, **__: y_NTC.as_subclass(_Passed)
        logits_NTV: Tensor = model(input_ids=tokens_NT.to(model.device), use_cache=False).logits
    return logits_NTV


@contextmanager
def standing_aside(blocks: list[Block]) -> Iterator[list[Tensor]]:
    """While open, blocks hand their input on and keep their arguments; gives the list that first inputs go into."""
    hidden: list[Tensor] = []
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_standing_aside(block, hidden))
        yield hidden


class _Passed(Tensor):
    """What a block that stands aside returns: its input, whether the model takes it as it is or as a tuple's first."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl  # whatever is computed with it is a plain tensor

    def __getitem__(self, index: Any) -> Any:
        whole = self.as_subclass(Tensor)
        return whole if isinstance(index, int) and index == 0 else whole[index]


@contextmanager
def _standing_aside(block: Block, hidden: list[Tensor]) -> Iterator[None]:
    """While open, calls of the block return their input and leave their arguments in the block."""

    def record(_: nn.Module, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        x_NTC = inputs[0] if inputs else arguments["hidden_states"]
        if block.index == 0:
            hidden.append(x_NTC)
        kept = {key: value for key, value in arguments.items() if key != "hidden_states"}
        block.arguments[x_NTC.shape[0], x_NTC.shape[1]] = kept

    def pass_on(*inputs: Any, **arguments: Any) -> Any:
        x_NTC = inputs[0] if inputs else arguments["hidden_states"]
        return x_NTC.as_subclass(_Passed)

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
