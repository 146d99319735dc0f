"""Blocks of packed models in bfloat16: while one sequence is decoded, consecutive blocks are one call of besa's kernel.

`besa.runtime.decoding` does the same for attention modules alone. What a block computes is found by trying it, too.
Which block follows another is learned from the first token.

Shape suffixes: B blocks, I columns.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from threading import local
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from besa.kernels.decoding import Block, passed
from besa.runtime.decoding import UNLIKE, Decoder, Prepared, layer_of, linears_of, norms_of, plain
from besa.runtime.growing import Room, room_of
from besa.runtime.kept import Kept
from besa.runtime.tracing import tracing

LINEARS = ("gate_proj", "up_proj", "down_proj")
NORMS = (  # before and after attention, before and after the MLP, as families call them
    ("input_layernorm", "", "post_attention_layernorm", ""),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
VAIN = 3  # tokens in a row of which a block was computed in vain, after which it is not computed with the one before


class _OfThread(local):
    """What blocks of a thread have computed; other threads decode other sequences.

    Attributes:
        latest: output of the last block that was computed, and that block.
        ahead: outputs computed before they are needed, by block.
    """

    def __init__(self) -> None:
        self.latest: tuple[Tensor | None, ReferenceType[BlockDecoder] | None] = None, None
        self.ahead: dict[ReferenceType[BlockDecoder], _Ahead] = {}


_here = _OfThread()


def speed_up(model: PreTrainedModel) -> None:
    """Let the blocks of a model decode by besa's kernel where it computes the same.

    Args:
        model: whose attention modules do.
    """
    if model.dtype != torch.bfloat16:
        return
    tables: list[Tensor] = []
    for block in model.modules():
        decoder = None if "forward" in vars(block) else _decoder(block, tables)
        if decoder is not None:
            block.forward = decoder


def restore(model: nn.Module) -> None:
    """Undo `speed_up`."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), BlockDecoder):
            del module.forward


class _Ahead(NamedTuple):
    """A block's output that was computed before the block is called, and the arguments it was computed from.

    Attributes:
        by: the block before it.
        output: (1, 1, I).
        input: (1, 1, I), which nothing else holds.
        token: arguments of the call: rotary embedding and mask.
        past: the cache, and the room in its layer.
    """

    by: ReferenceType[BlockDecoder]
    output: Tensor
    input: Tensor
    token: tuple[object, object]
    past: tuple[ReferenceType[DynamicCache], ReferenceType[Room]]

    def taken(
        self,
        index: int,
        hidden_states: Tensor,
        position_embeddings: object = None,
        attention_mask: object = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> bool:
        """Whether the block is called with the same arguments; if so, its layer of the cache has grown.

        Args:
            index: of the layer.
            hidden_states: as the family's own `forward` takes it, as are all others.
            position_embeddings: see there.
            attention_mask: see there.
            past_key_values: see there.
            others: see there.
        """
        embeddings, mask = self.token
        past: Any = self.past[0]()
        room = self.past[1]()
        if (
            position_embeddings is not embeddings
            or attention_mask is not mask
            or past is None
            or room is None
            or past_key_values is not past
            or index >= len(past.layers)
            or not isinstance(layer := past.layers[index], DynamicLayer)
            or not room.serves(layer)
            or hidden_states.dtype != self.input.dtype
            or not hidden_states.is_cpu
            or not torch.equal(hidden_states, self.input)
            or not plain(others)
        ):
            return False
        room.grow(layer)
        if (before := self.by()) is not None:
            before.vain = 0
        return True

    def in_vain(self) -> None:
        """Discard this output, which was not needed, and with it everything that this thread has computed ahead."""
        _here.ahead.clear()
        if (before := self.by()) is not None:
            before.vain += 1


class BlockDecoder:
    """The `forward` of a block that has been tried.

    A block that knows which block reads its output computes that block too, and so on, all in one call. Each output is
    kept until its block is called with the very input that it was computed from; so changes to outputs or caches in
    between take effect. Two blocks are no longer computed together after that was in vain for some tokens in a row.

    Attributes:
        vain: tokens in a row for which the next block was computed in vain.

    Args:
        block: its module.
        norms: names of the norms, as of `NORMS`.
        table: what the activation gives for each number of bfloat16 (65536,), by its bits.
    """

    def __init__(self, block: Any, norms: tuple[str, ...], table: Tensor) -> None:
        self._block, self._norms, self._table = block, norms, table
        self._activation = block.mlp.act_fn
        self._step = Kept[Block](block, self._made)
        self._next: ReferenceType[BlockDecoder] | None = None
        self.vain = 0

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """What the family's own `forward` gives."""
        found = self.decoded(*inputs, **named) if len(inputs) < 2 else None
        return type(self._block).forward(self._block, *inputs, **named) if found is None else found

    def decoded(self, hidden_states: Tensor | None = None, **named: Any) -> Tensor | None:
        """The block's output for one more token; None, with nothing changed, if this is no such call.

        Args:
            hidden_states: as the family's own `forward` takes it, as are all others.
            named: see there.
        """
        if hidden_states is None or tracing():
            return None
        ahead = _here.ahead.pop(ref(self), None)
        if ahead is not None:
            if ahead.taken(self._block.self_attn.layer_idx, hidden_states, **named):
                return ahead.output
            ahead.in_vain()
        output, decoder = _here.latest
        before = decoder() if decoder is not None and output is hidden_states else None
        if before is not None:
            before._next = ref(self)
        return self._computed(hidden_states, **named)

    def _computed(self, hidden_states: Tensor, **named: Any) -> Tensor | None:
        """Compute the output now, and with it the outputs of the blocks that follow."""
        attends = vars(self._block.self_attn).get("forward")
        found = attends.prepared(hidden_states, **named) if type(attends) is Decoder else None
        if found is None:
            return None
        left = next(iter(_here.ahead.values()), None)
        if left is not None:  # of another token, in which the model ended early, or was interrupted
            left.in_vain()
        past = named["past_key_values"]
        after: BlockDecoder | None = self
        decoders, steps, rooms = [], [], []
        while after is not None and after not in decoders and (ready := after._ready(found, past)) is not None:
            decoders.append(after)
            steps.append(ready[0])
            rooms.append(ready[1])
            after = after._after()
        if not steps:
            return None
        outputs_B11I = passed(steps, hidden_states.contiguous(), found.token, [room.place for room in rooms])
        inputs_B11I = outputs_B11I.clone()
        outputs = [outputs_B11I[b] for b in range(len(steps))]
        token = named["position_embeddings"], named.get("attention_mask")
        for b in range(1, len(steps)):
            past_and_room = ref(past), ref(rooms[b])
            ahead = _Ahead(ref(decoders[b - 1]), outputs[b], inputs_B11I[b - 1], token, past_and_room)
            _here.ahead[ref(decoders[b])] = ahead
        _here.latest = outputs[-1], ref(decoders[-1])
        rooms[0].grow(found.layer)
        return outputs[0]

    def _ready(self, found: Prepared, past: Cache) -> tuple[Block, Room] | None:
        """The step, and the room in the cache, for a token that an attention module is prepared for."""
        step, attends = self._step.now(torch.get_num_threads()), self._block.self_attn
        layer = None if step is None else layer_of(past, attends.layer_idx, step.attention)
        if step is None or layer is None or layer.keys.size(2) + 1 != found.token.tokens:
            return None
        fits = step.attention.shapes[0] == found.step.shapes[0] and attends.forward.turned == found.token.turned
        return (step, room_of(layer)) if fits else None

    def _after(self) -> BlockDecoder | None:
        """The next block, if it is known and neither block has a hook."""
        after = None if self._next is None or self.vain >= VAIN else self._next()
        if after is None or any(each._block._forward_hooks or each._block._forward_pre_hooks for each in (self, after)):
            return None
        return after

    def _made(self, threads: int) -> Block | None:
        assert threads == torch.get_num_threads()
        attends, mlp = vars(self._block.self_attn).get("forward"), self._block.mlp
        attention = attends.step(torch.bfloat16) if type(attends) is Decoder else None
        linears, norms = linears_of(mlp, LINEARS, torch.bfloat16), norms_of(self._block, self._norms, torch.bfloat16)
        if (
            attention is None
            or linears is None
            or norms is None
            or any(each.training for each in self._block.modules())
        ):
            return None
        if any("forward" in vars(each) for each in mlp.modules()) or mlp.act_fn is not self._activation:
            return None
        return Block(attention, norms, linears, self._table)

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles, without other blocks."""
        return {**self.__dict__, "_next": None}


@torch.inference_mode()
def _decoder(block: Any, tables: list[Tensor]) -> BlockDecoder | None:
    """The decoder of a block; None if it does something else.

    Args:
        block: any module.
        tables: of activations, as far as they are known; may become one more.
    """
    with torch.device("cpu"), suppress(*UNLIKE):  # whatever the program's default is
        attends, activation = block.self_attn.forward, block.mlp.act_fn
        if type(attends) is not Decoder or (isinstance(activation, nn.Module) and activation.state_dict()):
            return None
        table = _table(activation, tables)
        for norms in NORMS:
            if {"self_attn", "mlp", *filter(None, norms)} == {*block._modules}:
                decoder = BlockDecoder(block, norms, table)
                if attends.same(partial(type(block).forward, block), decoder.decoded, torch.bfloat16):
                    return decoder
    return None


def _table(activation: Any, tables: list[Tensor]) -> Tensor:
    """What an activation gives for each number of bfloat16 (65536,), by its bits; one of `tables` if it is there."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).roll(2**15)  # as whole numbers: 0 first
    new: Tensor = activation(bits.view(torch.bfloat16)).view(torch.int16)
    known = next((table for table in tables if torch.equal(table, new)), None)
    if known is None:
        tables.append(new)
    return new if known is None else known
