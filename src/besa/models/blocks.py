"""A decoder as a list of blocks: found in the module tree, fed without the rest of the model.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

import dis
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from besa.errors import BesaError
from besa.models.activations import HiddenStates
from besa.models.calls import Unknown, hidden_states_of, named, replayed
from besa.models.prunable import Prunable, everywhere, find_prunables, replaced

DEPTHS = ("num_hidden_layers", "num_layers", "decoder_layers")  # how configurations call the number of blocks


@dataclass(frozen=True)
class Block:
    """One decoder block and the arguments, besides the hidden states, that the model calls it with.

    Attributes:
        index: position in the decoder, from 0.
        name: module path in the model, such as ``model.layers.3``.
        module: the block itself.
        prunables: its prunable matrices by full module path, in module order.
        arguments: of its call by number of sequences and of tokens (masks, rotary embeddings), by name.
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
        arguments = {name: replayed(value, x_NTC.device) for name, value in captured.items()}
        if weights is None:
            output: Any = self.module(x_NTC.contiguous(), **arguments)
        else:
            parameters = replaced(dict(self.module.named_parameters()), self.prunables, weights)
            output = functional_call(self.module, parameters, (x_NTC.contiguous(),), arguments)
        return hidden_states_of(output)

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


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """The decoder blocks of a causal language model, from its module tree.

    Of several towers, the one that reads text is looked at; of its lists of modules that are as long as it is deep,
    the one with the most to prune is the decoder.

    Raises:
        BesaError: no list of decoder blocks is found, a block has no matrix to prune, one is computed from other
            parameters, or blocks share weights.
    """
    config = model.config.get_text_config()
    depths = [getattr(config, name) for name in DEPTHS if hasattr(config, name)]
    stacks = _stacks(model, _text_tower(model), depths) or _stacks(model, model, depths)
    if not stacks:
        raise BesaError(
            f"{type(model).__name__} has no stack of decoder blocks that besa can find: use a causal decoder."
        )
    path, found = max(stacks.items(), key=lambda item: sum(own.numel for part in item[1] for own in part.values()))
    blocks = []
    for index, (module, inner) in enumerate(zip(model.get_submodule(path), found, strict=True)):
        name = f"{path}.{index}"
        if not inner:
            raise BesaError(f"{name} of {type(model).__name__} has no linear weights to prune.")
        parameters = {own for own, _ in module.named_parameters()}
        if computed := [place for place, prunable in inner.items() if prunable.parameter not in parameters]:
            raise BesaError(
                f"The weight of {name}.{computed[0]} is no parameter but computed from others: remove its "
                "parametrization (torch.nn.utils), so that it is one."
            )
        prunables = {f"{name}.{place}": prunable for place, prunable in inner.items()}
        blocks.append(Block(index, name, module, prunables))
    _refuse_shared_weights(model, blocks)
    return blocks


def _text_tower(model: PreTrainedModel) -> nn.Module:
    """The part of a model that reads text: the model itself where it has no other."""
    tower: nn.Module = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    return tower


def _stacks(model: nn.Module, tower: nn.Module, depths: list[int]) -> dict[str, list[dict[str, Prunable]]]:
    """What is prunable in each module of every list of as many as the model is deep, by the path of the list."""
    inside = set(tower.modules())
    return {
        path: [find_prunables(part) for part in module]
        for path, module in model.named_modules()
        if module in inside and isinstance(module, nn.ModuleList) and 0 < len(module) in depths
    }


def _refuse_shared_weights(model: PreTrainedModel, blocks: list[Block]) -> None:
    """Blocks are pruned one after another, so no weight may stand in two places.

    Raises:
        BesaError: one does.
    """
    places: dict[int, str] = {}
    for block in blocks:
        for inner, parameter in block.module.named_parameters(remove_duplicate=False):
            name = f"{block.name}.{inner}"
            if (other := places.setdefault(id(parameter), name)) != name:
                raise BesaError(
                    f"{type(model).__name__} cannot be pruned block by block: {other} and {name} are one weight."
                )


def left_dense(blocks: Iterable[Block], pruned: Collection[str]) -> dict[str, int]:
    """Weights of the matrices that are not pruned, such as routers, convolutions and what is skipped.

    Args:
        blocks: of a decoder.
        pruned: full names of the prunable matrices that are.

    Returns:
        Sums over blocks by name within the block, with ``*`` for numbers. Norms and biases are no matrices.
    """
    dense: Counter[str] = Counter()
    for block in blocks:
        gone: Counter[str] = Counter()
        for name, prunable in block.prunables.items():
            gone[prunable.parameter] += prunable.numel if name in pruned else 0
        for name, parameter in block.module.named_parameters():
            weights = parameter.numel() - gone[name]
            if weights and parameter.dim() > 1 and not name.endswith("bias"):
                dense[everywhere(name.removesuffix(".weight"))] += weights
    return dict(dense)


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
    with standing_aside(blocks) as calls:
        for size in range(1, min(batch, len(tokens_NT)) + 1):
            for length in {tokens_NT.shape[1], *lengths}:
                run_base(model, tokens_NT[:size, :length])
        for part_NT in tokens_NT.split(batch):
            calls.clear()
            run_base(model, part_NT)
            x_NTC = calls[0].x_NTC
            calls.clear()
            yield x_NTC


def run_base(model: PreTrainedModel, tokens_NT: Tensor) -> None:
    """Run a model without its head, which may have no weights, on token ids (N, T)."""
    model.base_model(input_ids=tokens_NT.to(model.get_input_embeddings().weight.device), use_cache=False)


def logits_of(model: PreTrainedModel, blocks: list[Block], tokens_NT: Tensor, y_NTC: Tensor) -> Tensor:
    """What the model predicts (N, T, V) where its last block puts out `y_NTC`; gradients reach that.

    The blocks stand aside: their weights may be absent, all others are used.
    """
    with standing_aside(blocks):
        blocks[-1].module.forward = lambda *_, **__: y_NTC.as_subclass(_Passed)
        logits_NTV: Tensor = model(input_ids=tokens_NT.to(model.device), use_cache=False).logits
    return logits_NTV


@dataclass(frozen=True)
class Call:
    """A call of a block by its model, while blocks stand aside: hidden states (N, T, C), and what else was handed."""

    block: Block
    x_NTC: Tensor
    arguments: dict[str, Any]


@contextmanager
def standing_aside(blocks: list[Block]) -> Iterator[list[Call]]:
    """While open, blocks hand their input on and keep their arguments; gives the list that their calls go into."""
    calls: list[Call] = []
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_standing_aside(block, calls))
        yield calls


class _Passed(Tensor):
    """What a block that stands aside returns: its input, whether the model takes it as it is or as a tuple's first."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl  # whatever is computed with it is a plain tensor

    def __getitem__(self, index: Any) -> Any:
        whole = self.as_subclass(Tensor)
        if isinstance(index, int):
            return whole if index == 0 else Unknown()
        return whole[index]

    def __iter__(self) -> Iterator[Any]:
        """As many values as the model unpacks it into, of which the input is the first."""
        whole, frame = self.as_subclass(Tensor), sys._getframe(1)
        operation, number = frame.f_code.co_code[frame.f_lasti : frame.f_lasti + 2]
        if dis.opname[operation] not in ("UNPACK_SEQUENCE", "UNPACK_EX"):
            return iter(whole)
        return iter([whole, *(Unknown() for _ in range(1, number))])


@contextmanager
def _standing_aside(block: Block, calls: list[Call]) -> Iterator[None]:
    """While open, calls of the block return their input and leave their arguments in the block."""

    def pass_on(*inputs: Any, **keywords: Any) -> Any:
        x_NTC, arguments = named(block.module, inputs, keywords)
        calls.append(Call(block, x_NTC, arguments))
        block.arguments[x_NTC.shape[0], x_NTC.shape[1]] = arguments
        return x_NTC.as_subclass(_Passed)

    before = vars(block.module).get("forward")  # accelerate sets one of its own
    block.module.forward = pass_on
    try:
        yield
    finally:
        del block.module.forward  # the class's own forward shows again
        if before is not None:
            block.module.forward = before
