"""A decoder as a list of blocks: found in the module tree, fed without the rest of the model.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

import dis
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from besa.errors import BesaError
from besa.models.activations import HiddenStates, Room
from besa.models.calls import Unknown, hidden_states_of, named, replayed
from besa.models.prunable import Prunable, everywhere, find_prunables, replaced
from besa.models.transfers import Outputs, fetched
from besa.storage.formats.container import DEPTHS
from besa.system.ranks import Share

SAME_POSITION = 0.01  # difference of two cosines that rounding to bfloat16 explains


@dataclass(frozen=True)
class Block:
    """One decoder block, and the arguments beside the hidden states that the model calls it with.

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
        """The prunable matrix (O, I) of that name, as a view of the block's current weight."""
        prunable = self.prunables[name]
        return prunable.of(self.module.get_parameter(prunable.parameter))

    def __call__(
        self,
        x_NTC: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        others: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Output (N, T, C) of the block for hidden states (N, T, C).

        Args:
            x_NTC: input on the block's device.
            weights: matrices by full name that replace the block's own; gradients reach them.
            others: parameters by name within the block, such as norms, that replace its own; gradients reach them.
        """
        captured = self.arguments[x_NTC.shape[0], x_NTC.shape[1]]
        arguments = {name: replayed(value, x_NTC.device) for name, value in captured.items()}
        if weights is None and others is None:
            output: Any = self.module(x_NTC.contiguous(), **arguments)
        else:
            parameters = replaced(dict(self.module.named_parameters()), self.prunables, weights or {}) | dict(
                others or {}
            )
            output = functional_call(self.module, parameters, (x_NTC.contiguous(),), arguments)
        return hidden_states_of(output)

    def run(self, x_NTC: HiddenStates, batch: int, into: HiddenStates | None = None) -> None:
        """Run the block on all sequences, `batch` at a time on the block's device.

        Args:
            x_NTC: inputs (N, T, C); may be on another device.
            batch: sequences in a forward pass.
            into: receives the outputs, and may be `x_NTC` itself; None discards them.

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
    """Apply a function to all sequences; see `Block.run`. The host waits for the device once, at the end.

    Args:
        function: of hidden states (N, T, C).
        name: of the function, for the error message.
        x_NTC: inputs (N, T, C); may be on another device.
        batch: sequences in a forward pass.
        device: of the function.
        into: receives the outputs, and may be `x_NTC` itself; None discards them.

    Raises:
        BesaError: an output is NaN or infinite.
    """
    outputs = None if into is None else Outputs(into, device)
    extremes: list[Tensor] = []  # of every batch; they stay on the device, so that the host waits once
    for start in range(0, len(x_NTC), batch):
        part = slice(start, start + batch)
        y_NTC = function(fetched(x_NTC[part], device))
        extremes += y_NTC.aminmax()
        if outputs is not None:
            outputs.put(part, y_NTC)
    if outputs is not None:
        outputs.finish()
    if extremes and not bool(torch.stack(extremes).isfinite().all()):
        raise BesaError(
            f"The output of {name} has NaN or infinity: try --dtype float32, and check the model with `besa eval`."
        )


def find_blocks(model: PreTrainedModel) -> list[Block]:
    """The decoder blocks of a causal language model, from its module tree.

    The decoder is the list of modules that is as long as the model is deep and has the most prunable weights. If the
    model has several towers, only the one that reads text counts.

    Raises:
        BesaError: no list of decoder blocks is found, a block has no matrix to prune, a matrix is computed from other
            parameters, or blocks share weights.
    """
    config = model.config.get_text_config()
    depths = [getattr(config, name) for name in DEPTHS if hasattr(config, name)]
    stacks = _stacks(model, _text_tower(model), depths) or _stacks(model, model, depths)
    if not stacks:
        raise BesaError(
            f"{type(model).__name__} has no stack of decoder blocks that besa can find: use a causal decoder."
        )
    path, largest = max(stacks.items(), key=lambda item: sum(each.numel for part in item[1] for each in part.values()))
    blocks = []
    for index, (module, inner) in enumerate(zip(model.get_submodule(path), largest, strict=True)):
        name = f"{path}.{index}"
        if not inner:
            raise BesaError(f"{name} of {type(model).__name__} has no linear weights to prune.")
        parameters = {parameter for parameter, _ in module.named_parameters()}
        if computed := [place for place, prunable in inner.items() if prunable.parameter not in parameters]:
            raise BesaError(
                f"The weight of {name}.{computed[0]} is computed from other parameters: remove its parametrization "
                "(torch.nn.utils), so that the weight itself is a parameter."
            )
        prunables = {f"{name}.{place}": prunable for place, prunable in inner.items()}
        blocks.append(Block(index, name, module, prunables))
    _refuse_shared_weights(model, blocks)
    return blocks


def _text_tower(model: PreTrainedModel) -> nn.Module:
    """The part of a model that reads text, often the model itself."""
    tower: nn.Module = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    return tower


def _stacks(model: nn.Module, tower: nn.Module, depths: list[int]) -> dict[str, list[dict[str, Prunable]]]:
    """The prunable matrices of each module, for every list with as many modules as the model is deep, by its path."""
    inside = set(tower.modules())
    return {
        path: [find_prunables(part) for part in module]
        for path, module in model.named_modules()
        if module in inside and isinstance(module, nn.ModuleList) and 0 < len(module) in depths
    }


def _refuse_shared_weights(model: PreTrainedModel, blocks: list[Block]) -> None:
    """Refuse a weight that belongs to two blocks or places: blocks are pruned one after another.

    Raises:
        BesaError: there is such a weight.
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
    """Number of weights in matrices that are not pruned, such as routers, convolutions and skipped linears.

    Args:
        blocks: of a decoder.
        pruned: full names of the pruned matrices.

    Returns:
        Sums over blocks by name within the block, with ``*`` for numbers. Norms and biases do not count.
    """
    dense: Counter[str] = Counter()
    for block in blocks:
        in_pruned: Counter[str] = Counter()
        for name, prunable in block.prunables.items():
            in_pruned[prunable.parameter] += prunable.numel if name in pruned else 0
        for name, parameter in block.module.named_parameters():
            weights = parameter.numel() - in_pruned[name]
            if weights and parameter.dim() > 1 and not name.endswith("bias"):
                dense[everywhere(name.removesuffix(".weight"))] += weights
    return dict(dense)


@torch.no_grad()
def capture_inputs(
    model: PreTrainedModel, blocks: list[Block], tokens_NT: Tensor, batch: int, lengths: Collection[int] = ()
) -> Iterator[Tensor]:
    """Yield the inputs of the first block (up to `batch`, T, C) for the token ids (N, T), in their order.

    The model runs with its blocks standing aside: each returns its input unchanged. This costs the embeddings only, and
    the blocks need no weights. Before the first part is yielded, the call arguments of every block are captured. Masks
    and position biases may depend on the shape, so this is done for every batch size up to `batch`, for sequences of T
    tokens and for their beginnings of `lengths` tokens.

    Raises:
        BesaError: a beginning does not stand for itself, as its positions are others in the whole sequence.
    """
    with standing_aside(blocks) as calls:
        for size in range(1, min(batch, len(tokens_NT)) + 1):
            for length in {tokens_NT.shape[1], *lengths}:
                run_base(model, tokens_NT[:size, :length])
        for block in blocks:
            for length in lengths:
                _check_positions(block, type(model).__name__, tokens_NT.shape[1], length)
        for part_NT in tokens_NT.split(batch):
            calls.clear()
            run_base(model, part_NT)
            x_NTC = calls[0].x_NTC.detach()  # a hook of the caller's may have made it require gradients
            calls.clear()
            yield x_NTC


def _check_positions(block: Block, name: str, seqlen: int, length: int) -> None:
    """Check that the beginning of a sequence has the rotary embeddings that it has within the whole sequence.

    Args:
        block: with the arguments of both calls.
        name: of the model.
        seqlen: tokens of the whole sequence.
        length: of the beginning.

    Raises:
        BesaError: it has others: their scaling depends on the length, as of longrope and dynamic NTK.
    """
    for argument, whole in block.arguments[1, seqlen].items():
        if not argument.startswith("position_embeddings") or length == seqlen:
            continue
        begun = block.arguments[1, length].get(argument)
        for one, other in zip(tree_leaves(whole), tree_leaves(begun), strict=True):
            if not isinstance(one, Tensor):
                continue
            longer = (axis for axis, size in enumerate(one.shape) if size != other.shape[axis])
            if any(not torch.allclose(one.narrow(axis, 0, length), other, atol=SAME_POSITION) for axis in longer):
                raise BesaError(
                    f"{name} has other rotary embeddings in sequences of {seqlen:,} tokens than in their first "
                    f"{length:,}, and besa compares the two: give a shorter --seqlen, such as {length}."
                )


def embedded(
    model: PreTrainedModel,
    blocks: list[Block],
    tokens_NT: Tensor,
    batch: int,
    room: Room,
    share: Share,
    lengths: Collection[int] = (),
) -> HiddenStates:
    """The inputs of the first block (n, T, C) for a share of the sequences, kept in `room`.

    Other arguments as of `capture_inputs`.
    """
    places = range(share.first, share.end) or range(1)  # call arguments are needed without a sequence too
    parts = capture_inputs(model, blocks, tokens_NT[places.start : places.stop], batch, lengths)
    first_NTC = next(parts)
    x_NTC = room.empty((len(share), *first_NTC.shape[1:]), first_NTC.dtype)
    for start, part_NTC in zip(range(0, len(share), batch), chain([first_NTC], parts), strict=False):
        x_NTC[start : start + len(part_NTC)] = part_NTC
    return x_NTC


def run_base(model: PreTrainedModel, tokens_NT: Tensor) -> None:
    """Run a model on token ids (N, T), without its head, which may have no weights."""
    model.base_model(input_ids=tokens_NT.to(model.get_input_embeddings().weight.device), use_cache=False)


def logits_of(
    model: PreTrainedModel,
    blocks: list[Block],
    tokens_NT: Tensor,
    y_NTC: Tensor,
    parameters: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Logits (N, T, V) of the model for the output `y_NTC` of its last block; gradients reach `y_NTC`.

    The blocks stand aside and need no weights. All other weights are used, on the device of `y_NTC`.

    Args:
        model: the model.
        blocks: of the model.
        tokens_NT: that were read.
        y_NTC: output of the last block.
        parameters: outside the blocks, by full name, that replace the model's own; gradients reach them.
    """
    with standing_aside(blocks), _without_router_logits(model):
        blocks[-1].module.forward = lambda *_, **__: y_NTC.as_subclass(_Passed)
        arguments = {"input_ids": tokens_NT.to(y_NTC.device), "use_cache": False}
        output = functional_call(model, dict(parameters), (), arguments) if parameters else model(**arguments)
        logits_NTV: Tensor = output.logits
    return logits_NTV


@contextmanager
def _without_router_logits(model: PreTrainedModel) -> Iterator[None]:
    """While open, the head asks no router for its logits: those of blocks that stand aside have none."""
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    asking = [config for config in configs if getattr(config, "output_router_logits", False)]
    for config in asking:
        config.output_router_logits = False
    try:
        yield
    finally:
        for config in asking:
            config.output_router_logits = True


@dataclass(frozen=True)
class Call:
    """A call of a block by its model while blocks stand aside.

    Attributes:
        block: that was called.
        x_NTC: hidden states.
        arguments: all others.
        y_NTC: what was returned.
    """

    block: Block
    x_NTC: Tensor
    arguments: dict[str, Any]
    y_NTC: Tensor


@contextmanager
def standing_aside(blocks: list[Block], factors: Sequence[float] = ()) -> Iterator[list[Call]]:
    """While open, blocks return their input and keep their arguments; yields the list of their calls, which grows.

    Args:
        blocks: that stand aside.
        factors: one for each block, by which it multiplies its input.
    """
    calls: list[Call] = []
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_standing_aside(block, calls, factors[block.index] if factors else 1))
        yield calls


class _Passed(Tensor):
    """The output of a block that stands aside: its input, which also serves as the first value of a tuple."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl  # results of computations are plain tensors

    def __getitem__(self, index: Any) -> Any:
        whole = self.as_subclass(Tensor)
        if isinstance(index, int):
            return whole if index == 0 else Unknown()
        return whole[index]

    def __iter__(self) -> Iterator[Any]:
        """Give as many values as the model unpacks; the input is the first."""
        whole, frame = self.as_subclass(Tensor), sys._getframe(1)
        operation, number = frame.f_code.co_code[frame.f_lasti : frame.f_lasti + 2]
        if dis.opname[operation] not in ("UNPACK_SEQUENCE", "UNPACK_EX"):
            return iter(whole)
        return iter([whole, *(Unknown() for _ in range(1, number))])


@contextmanager
def _standing_aside(block: Block, calls: list[Call], factor: float) -> Iterator[None]:
    """While open, calls of the block return their input times a factor and store their arguments in the block."""

    def pass_on(*inputs: Any, **keywords: Any) -> Any:
        x_NTC, arguments = named(block.module, inputs, keywords)
        y_NTC = x_NTC if factor == 1 else x_NTC * factor
        calls.append(Call(block, x_NTC, arguments, y_NTC))
        block.arguments[x_NTC.shape[0], x_NTC.shape[1]] = arguments
        return y_NTC.as_subclass(_Passed)

    before = vars(block.module).get("forward")  # accelerate sets its own
    block.module.forward = pass_on
    try:
        yield
    finally:
        del block.module.forward  # the class's own forward shows again
        if before is not None:
            block.module.forward = before
