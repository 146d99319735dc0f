"""The two ends of a model, which know its vocabulary: the embeddings and the head. They run without the blocks.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from besa.errors import BesaError
from besa.models.activations import HiddenStates, Room
from besa.models.aside import Passed, standing_aside
from besa.models.blocks import Block
from besa.system.ranks import Share

SAME_POSITION = 0.01  # difference of two cosines that rounding to bfloat16 explains


def ends(model: PreTrainedModel) -> list[str]:
    """Names of the modules whose weights may be stored as codes: the embeddings, and the head if there is one.

    Args:
        model: may be on the meta device.

    Raises:
        BesaError: the embeddings are no embedding of torch or have parameters of their own, or the head is no plain
            linear.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    alone = isinstance(embeddings, nn.Embedding) and len(list(embeddings.parameters())) == 1  # Inkling's have a norm
    if not alone or (head is not None and type(head) is not nn.Linear):
        own = head if alone else embeddings
        raise BesaError(
            f"The head and the embeddings cannot be stored as codes, as this model has a {type(own).__name__}: "
            "leave out --head."
        )
    return [name for name, module in model.named_modules() if module is embeddings or module is head]


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
        blocks[-1].module.forward = lambda *_, **__: y_NTC.as_subclass(Passed)
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
