"""The check before the work: blocks as besa runs them compute what the model computes, seen on two short batches.

Besa calls a block by itself, for any sequences and for their beginnings, with the arguments that the model made once
for that many. That is right where arguments do not depend on the tokens or on other blocks, and where the model calls
its blocks once each, in order, each with what the one before it put out. All of this is found out without the blocks'
weights. What blocks put out is compared where their weights are: at once for a model in memory, else as each is opened.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from besa.errors import BesaError
from besa.models.blocks import Block, Call, run_base, standing_aside
from besa.models.calls import (
    ElsewhereError,
    Unknown,
    equal,
    hidden_states_of,
    moved,
    replayed,
    shares,
    stranger,
    versions,
)
from besa.models.streaming import Decoder, DecoderInMemory

SHAPES = ((2, 16), (1, 11))  # sequences and tokens of the batches
ROUNDING = 4  # times the step of the dtype: by how much outputs may differ, relative to their norm
AHEAD = 1e-3  # share of what a block adds to a token that may change where sequences end earlier, and sums are others
META = torch.device("meta")


@dataclass
class _Batch:
    """A short batch on its way through the blocks.

    Attributes:
        tokens_NT: token ids.
        calls: of every block, as the model makes them for these tokens.
        x_NTC: hidden states as besa computes them, before the next block.
        outputs: of every block in the model's own forward pass; empty where the model is not there as a whole.
    """

    tokens_NT: Tensor
    calls: list[Call]
    x_NTC: Tensor
    outputs: list[Tensor] = field(default_factory=list)


class Check:
    """Compares the blocks of a decoder, in their order, with the model's own calls of them.

    Args:
        decoder: dense.
        tokens_NT: token ids that the blocks will be run for; a few of them are used.

    Raises:
        BesaError: the model's blocks are not functions of their hidden states alone, or a difference is found.
    """

    def __init__(self, decoder: Decoder, tokens_NT: Tensor) -> None:
        self._model = decoder.model
        with decoder.embeddings(), torch.no_grad():
            self._batches = [self._begin(decoder, *_drawn(self._model, tokens_NT, shape)) for shape in SHAPES]
        self._done = 0
        if isinstance(decoder, DecoderInMemory):
            with decoder.opened(decoder.blocks[0], self._model.device):  # experts one by one, as for pruning
                for batch in self._batches:
                    batch.outputs = self._own_outputs(decoder, batch)
                for block in decoder.blocks:
                    self.see(block)

    @torch.no_grad()
    def see(self, block: Block) -> None:
        """Compare a block, which has its dense weights; each is compared once.

        Raises:
            BesaError: it puts out something else than in the model, or changes what it is handed.
        """
        if block.index < self._done:
            return
        self._done += 1
        device = next(block.module.parameters()).device
        for batch in self._batches:
            x_NTC, call = batch.x_NTC.to(device), batch.calls[block.index]
            arguments = block.arguments[x_NTC.shape[0], x_NTC.shape[1]]
            with self._explained(f"{block.name} cannot be run by itself", block):
                expected_NTC = batch.outputs[block.index].to(device) if batch.outputs else _called(call, x_NTC.clone())
                before = versions([x_NTC, arguments])
                y_NTC = block(x_NTC)
            if not bool(expected_NTC.isfinite().all()):  # the run itself says so, and what to do
                self._done = len(batch.calls)
                return
            if versions([x_NTC, arguments]) != before:
                self._refuse(f"{block.name} changes what it is handed, in place")
            apart = float((y_NTC - expected_NTC).float().norm() / expected_NTC.float().norm().clamp_min(1e-30))
            if not apart <= ROUNDING * torch.finfo(y_NTC.dtype).eps:
                self._refuse(
                    f"what {block.name} puts out by itself is off by {apart:.2%} from what it does in the model"
                )
            if batch is self._batches[0]:
                self._look_ahead(block, x_NTC, y_NTC)
            batch.x_NTC = y_NTC

    def _look_ahead(self, block: Block, x_NTC: Tensor, y_NTC: Tensor) -> None:
        """Refuse a block whose outputs depend on later tokens: they are others where sequences end earlier."""
        samples, tokens = self._batches[1].tokens_NT.shape
        start_NTC, whole_NTC = x_NTC[:samples, :tokens], y_NTC[:samples, :tokens]
        changed_NT = (block(start_NTC) - whole_NTC).float().norm(dim=-1)
        made_NT, size_NT = (whole_NTC - start_NTC).float().norm(dim=-1), whole_NTC.float().norm(dim=-1)
        allowed_NT = torch.maximum(AHEAD * made_NT, ROUNDING * torch.finfo(y_NTC.dtype).eps * size_NT)
        if (changed_NT > allowed_NT).float().mean() > 0.5:  # a few may go to other experts, for rounding
            self._refuse(f"{block.name} looks ahead: what it puts out for a token depends on those that follow")

    def _begin(self, decoder: Decoder, first_NT: Tensor, other_NT: Tensor) -> _Batch:
        """Have the arguments of the blocks made for two batches of one shape; the blocks keep those of the first."""
        calls = self._calls(decoder, other_NT)
        kept = self._calls(decoder, first_NT)
        for call, own in zip(calls, kept, strict=True):
            for name, value in call.arguments.items():
                self._look_at(call.block, name, value, own.arguments.get(name))
            if call.arguments.keys() != own.arguments.keys():
                self._refuse(f"which arguments {call.block.name} gets depends on the tokens")
            if any(map(shares, call.arguments.values())):
                self._rehearse(call)
        return _Batch(other_NT, calls, calls[0].x_NTC)

    def _look_at(self, block: Block, name: str, value: Any, other: Any) -> None:
        """Refuse an argument that cannot be handed over again; `other` is what it is for other tokens."""
        found = stranger(value)
        if isinstance(found, Unknown):
            self._refuse(f"{block.name} gets {name} from the block before it")
        if found is not None:
            self._refuse(
                f"{block.name} gets {name} with a {type(found).__name__} in it, which may change between calls"
            )
        if not equal(value, other):
            self._refuse(f"the argument {name} of {block.name} depends on the tokens, not on their number alone")

    def _calls(self, decoder: Decoder, tokens_NT: Tensor) -> list[Call]:
        """The model's calls of its blocks, which stand aside.

        Raises:
            BesaError: they are not one for each block, in order, of the hidden states of the one before.
        """
        with self._explained("it cannot be run with its blocks aside"), standing_aside(decoder.blocks) as calls:
            try:
                run_base(self._model, tokens_NT)
            finally:  # of hidden states that are laid out in another way, models make what they will
                self._look_at_layout(calls, tuple(tokens_NT.shape))
        order = [call.block.index for call in calls]
        if not order:
            self._refuse(f"{decoder.blocks[0].name} and those after it take no part in what it computes of token ids")
        if order != list(range(len(decoder.blocks))):
            self._refuse(f"it calls its blocks not once each, in order, but {', '.join(map(str, order[:20]))}")
        for call in calls[1:]:
            if not equal(call.x_NTC, calls[0].x_NTC):
                self._refuse(f"{call.block.name} gets something else than the block before it puts out")
        return calls

    def _look_at_layout(self, calls: list[Call], size: tuple[int, ...]) -> None:
        """Refuse hidden states that are not one vector for each of so many sequences and tokens."""
        shape = tuple(calls[0].x_NTC.shape) if calls else (*size, 1)
        if len(shape) != 3 or shape[:2] != size:
            self._refuse(
                f"for {size} sequences and tokens, its hidden states are {shape}, not one vector for each token"
            )

    def _rehearse(self, call: Call) -> None:
        """Run a block without values, to see whether it looks for what other blocks left in a mapping.

        Raises:
            BesaError: it does.
        """
        module = call.block.module
        tensors = {name: own.to(META) for name, own in chain(module.named_parameters(), module.named_buffers())}
        arguments = {name: replayed(value, META) for name, value in call.arguments.items()}
        try:
            functional_call(module, tensors, (call.x_NTC.to(META),), arguments)
        except ElsewhereError as error:
            self._refuse_sharing(call.block, error)
        except Exception:  # what computes with values is seen when it has some
            pass

    def _own_outputs(self, decoder: DecoderInMemory, batch: _Batch) -> list[Tensor]:
        """What the blocks put out in the model's own forward pass of a batch."""
        outputs: list[Tensor] = []
        handles = [
            block.module.register_forward_hook(lambda _, __, output: outputs.append(hidden_states_of(output).clone()))
            for block in decoder.blocks
        ]
        try:
            with torch.no_grad(), self._explained("it cannot be run"):
                run_base(self._model, batch.tokens_NT)
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    @contextmanager
    def _explained(self, failed: str, block: Block | None = None) -> Iterator[None]:
        """Turn whatever model code raises into one sentence that begins with what failed."""
        try:
            yield
        except (KeyboardInterrupt, MemoryError, torch.OutOfMemoryError, BesaError):
            raise
        except Exception as error:
            if block is not None and isinstance(error, ElsewhereError):
                self._refuse_sharing(block, error)
            reason = " ".join(str(error).split()).rstrip(".")[:200]
            self._refuse(f"{failed} ({type(error).__name__}: {reason})")

    def _refuse_sharing(self, block: Block, error: ElsewhereError) -> NoReturn:
        names = [name for own in block.arguments.values() for name, value in own.items() if shares(value)]
        self._refuse(f"{block.name} looks in {names[0]} for what other blocks left there ({error.args[0]!r})")

    def _refuse(self, reason: str) -> NoReturn:
        raise BesaError(f"{type(self._model).__name__} cannot be pruned block by block: {reason}.")


def _drawn(model: PreTrainedModel, tokens_NT: Tensor, shape: tuple[int, int]) -> Tensor:
    """Two batches (2, N, T) of the tokens that occur; the second begins with those that models treat as special."""
    config = model.config.get_text_config()
    named = [getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos")]
    known_V = tokens_NT.unique()
    special = known_V[torch.isin(known_V, torch.tensor([own for own in named if isinstance(own, int)]))]
    size = (2, shape[0], min(shape[1], tokens_NT.shape[1]))
    drawn_2NT: Tensor = known_V[torch.randint(len(known_V), size, generator=torch.Generator().manual_seed(0))]
    drawn_2NT[1, 0, : len(special)] = special[: size[2]]
    return drawn_2NT


def _called(call: Call, x_NTC: Tensor) -> Tensor:
    """What a block puts out for a call as the model makes it; blocks find there what others have left."""
    arguments = {name: moved(value, x_NTC.device) for name, value in call.arguments.items()}
    return hidden_states_of(call.block.module(x_NTC, **arguments))
