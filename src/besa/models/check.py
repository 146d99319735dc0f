"""The check before the work: on two short batches, blocks run by besa must compute what the model computes.

Besa calls a block by itself, with the arguments that the model made once for sequences of that number and length. This
is right if no argument depends on the tokens or on other blocks, and if the model calls each block once, in order, with
the output of the block before. These conditions are checked without the blocks' weights. The outputs of blocks are
compared once their weights are in memory: at once for a model in memory, otherwise as each block is opened.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from besa.errors import BesaError
from besa.models.aside import Call, standing_aside
from besa.models.blocks import Block
from besa.models.calls import (
    ElsewhereError,
    Sameness,
    Unknown,
    changeable,
    hidden_states_of,
    moved,
    replayed,
    shares,
    versions,
)
from besa.models.ends import run_base
from besa.models.streaming import Decoder, DecoderInMemory

SHAPES = ((2, 16), (1, 11))  # sequences and tokens of the batches
ROUNDING = 4  # machine epsilons by which outputs may differ, relative to their norm
# The share of a block's update of a token that may change if the sequence is cut, because sums round otherwise.
AHEAD = 1e-3
META = torch.device("meta")


@dataclass
class _Batch:
    """A short batch on its way through the blocks.

    Attributes:
        tokens_NT: token ids.
        calls: the model's calls of its blocks for these tokens.
        x_NTC: inputs of the next block, as besa computes them.
        outputs: of every block in the model's own forward pass; empty if the model is not in memory as a whole.
    """

    tokens_NT: Tensor
    calls: list[Call]
    x_NTC: Tensor
    outputs: list[Tensor] = field(default_factory=list)


class Check:
    """Compares the blocks of a decoder, in their order, with the model's own calls of them.

    Args:
        decoder: dense.
        tokens_NT: token ids that the blocks will process; a few of them are used.
        device: where the blocks will be opened.

    Raises:
        BesaError: the blocks are not functions of their hidden states alone, or their outputs differ.
    """

    def __init__(self, decoder: Decoder, tokens_NT: Tensor, device: torch.device) -> None:
        self._model = decoder.model
        with decoder.embeddings(device), torch.no_grad():
            self._batches = [self._begin(decoder, *_drawn(self._model, tokens_NT, shape)) for shape in SHAPES]
        self._done = 0
        if isinstance(decoder, DecoderInMemory) and self._model.device == device:
            with decoder.opened(decoder.blocks[0], device):  # experts compute one by one, as for pruning
                for batch in self._batches:
                    batch.outputs = self._own_outputs(decoder, batch)
                for block in decoder.blocks:
                    self.see(block)

    @torch.no_grad()
    def see(self, block: Block) -> None:
        """Compare a block, which has its dense weights; each block is compared once. The host waits for it once.

        Raises:
            BesaError: its output differs from that in the model, or it changes its arguments in place.
        """
        if block.index < self._done:
            return
        self._done += 1
        found: list[Tensor] = []
        for batch in self._batches:
            x_NTC = batch.x_NTC
            y_NTC, expected_NTC = self._outputs(block, batch)
            difference = (y_NTC - expected_NTC).float().norm() / expected_NTC.float().norm().clamp_min(1e-30)
            ahead = self._ahead(block, x_NTC, y_NTC) if batch is self._batches[0] else torch.zeros_like(difference)
            found += [expected_NTC.isfinite().all().to(difference), difference, ahead]
            batch.x_NTC = y_NTC
        for finite, difference, ahead in torch.stack(found).view(-1, 3).tolist():
            if not finite:  # the run refuses this with a better message
                self._done = len(self._batches[0].calls)
                return
            if not difference <= ROUNDING * torch.finfo(y_NTC.dtype).eps:
                self._refuse(
                    f"the output of {block.name} by itself differs by {difference:.2%} from its output in the model"
                )
            if ahead > 0.5:  # rounding may send a few tokens to other experts
                self._refuse(f"{block.name} looks ahead: its output for a token depends on later tokens")

    def _outputs(self, block: Block, batch: _Batch) -> tuple[Tensor, Tensor]:
        """The output of a block by itself, and the one in the model."""
        x_NTC, arguments = batch.x_NTC, block.arguments[batch.x_NTC.shape[0], batch.x_NTC.shape[1]]
        with self._explained(f"{block.name} cannot be run by itself", block):
            expected_NTC = (
                batch.outputs[block.index] if batch.outputs else _called(batch.calls[block.index], x_NTC.clone())
            )
            before = versions([x_NTC, arguments])
            y_NTC = block(x_NTC)
        if versions([x_NTC, arguments]) != before:
            self._refuse(f"{block.name} changes its arguments in place")
        return y_NTC, expected_NTC

    def _ahead(self, block: Block, x_NTC: Tensor, y_NTC: Tensor) -> Tensor:
        """The share of tokens (scalar) whose output depends on later tokens: it changes if the sequences are cut."""
        samples, tokens = self._batches[1].tokens_NT.shape
        start_NTC, whole_NTC = x_NTC[:samples, :tokens], y_NTC[:samples, :tokens]
        changed_NT = (block(start_NTC) - whole_NTC).float().norm(dim=-1)
        made_NT, size_NT = (whole_NTC - start_NTC).float().norm(dim=-1), whole_NTC.float().norm(dim=-1)
        allowed_NT = torch.maximum(AHEAD * made_NT, ROUNDING * torch.finfo(y_NTC.dtype).eps * size_NT)
        share: Tensor = (changed_NT > allowed_NT).float().mean()
        return share

    def _begin(self, decoder: Decoder, first_NT: Tensor, other_NT: Tensor) -> _Batch:
        """Capture the arguments of the blocks for two batches of one shape; the blocks keep those of the first."""
        calls = self._calls(decoder, other_NT)
        kept_calls = self._calls(decoder, first_NT)
        same = Sameness()  # most arguments are the same tensors for all blocks
        for call, kept in zip(calls, kept_calls, strict=True):
            for name, value in call.arguments.items():
                self._check_argument(call.block, name, value, kept.arguments.get(name), same)
            if call.arguments.keys() != kept.arguments.keys():
                self._refuse(f"the tokens decide which arguments {call.block.name} gets")
            if any(map(shares, call.arguments.values())):
                self._rehearse(call)
        return _Batch(other_NT, calls, calls[0].x_NTC)

    def _check_argument(self, block: Block, name: str, value: Any, other: Any, same: Sameness) -> None:
        """Refuse an argument that cannot be passed again; `other` is its value for other tokens."""
        part = changeable(value)
        if isinstance(part, Unknown):
            self._refuse(f"{block.name} gets {name} from the block before it")
        if isinstance(part, BlockMask):
            self._refuse(f"{block.name} has flex attention, use model.set_attn_implementation('sdpa')")
        if part is not None:
            self._refuse(f"{block.name} gets {name} with a {type(part).__name__} in it, which may change between calls")
        if not same(value, other):
            self._refuse(f"the argument {name} of {block.name} depends on the tokens, not on their number alone")

    def _calls(self, decoder: Decoder, tokens_NT: Tensor) -> list[Call]:
        """The model's calls of its blocks, which stand aside.

        They double and halve their inputs in turn, without rounding. So a mean of the outputs of several blocks, which
        would be the output of the last one if all were alike, is not taken for it.

        Raises:
            BesaError: the model does not call each block once, in order, with the output of the block before.
        """
        factors = [0.5 if block.index % 2 else 2.0 for block in decoder.blocks]
        aside = standing_aside(decoder.blocks, factors)
        with self._explained("it cannot be run with its blocks aside"), aside as calls:
            try:
                run_base(self._model, tokens_NT)
            finally:  # also after an error, which another layout of the hidden states may have caused
                self._check_shape(calls, tuple(tokens_NT.shape))
        order = [call.block.index for call in calls]
        if not order:
            self._refuse(f"it does not call {decoder.blocks[0].name} or later blocks for token ids")
        if order != list(range(len(decoder.blocks))):
            self._refuse(f"it does not call each block once, in order, but {', '.join(map(str, order[:20]))}")
        same = Sameness()
        for before, call in pairwise(calls):
            if not same(call.x_NTC, before.y_NTC):
                self._refuse(f"the input of {call.block.name} is not the output of the block before it")
        return calls

    def _check_shape(self, calls: list[Call], size: tuple[int, ...]) -> None:
        """Refuse hidden states that are not one vector for each token; `size` is that of the token ids (N, T)."""
        shape = tuple(calls[0].x_NTC.shape) if calls else (*size, 1)
        if len(shape) != 3 or shape[:2] != size:
            self._refuse(
                f"for {size} sequences and tokens, its hidden states are {shape}, not one vector for each token"
            )

    def _rehearse(self, call: Call) -> None:
        """Run a block on the meta device to see whether it needs entries of other blocks in a mapping.

        Raises:
            BesaError: it does.
        """
        module = call.block.module
        tensors = {name: tensor.to(META) for name, tensor in chain(module.named_parameters(), module.named_buffers())}
        arguments = {name: replayed(value, META) for name, value in call.arguments.items()}
        try:
            functional_call(module, tensors, (call.x_NTC.to(META),), arguments)
        except ElsewhereError as error:
            self._refuse_sharing(call.block, error)
        except Exception:  # a block that needs values fails here, and is checked once it has them
            pass

    def _own_outputs(self, decoder: DecoderInMemory, batch: _Batch) -> list[Tensor]:
        """The outputs of the blocks in the model's own forward pass of a batch."""
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
        """Turn any exception of model code into one sentence that begins with `failed`."""
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
        names = [name for arguments in block.arguments.values() for name, value in arguments.items() if shares(value)]
        self._refuse(f"{block.name} looks in {names[0]} for an entry of another block ({error.args[0]!r})")

    def _refuse(self, reason: str) -> NoReturn:
        raise BesaError(f"{type(self._model).__name__} cannot be pruned block by block: {reason}.")


def _drawn(model: PreTrainedModel, tokens_NT: Tensor, shape: tuple[int, int]) -> Tensor:
    """Two batches (2, N, T) of tokens that occur in `tokens_NT`; the second begins with the special ones of these."""
    config = model.config.get_text_config()
    special_ids = [getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos")]
    known_V = tokens_NT.unique()
    special = known_V[torch.isin(known_V, torch.tensor([each for each in special_ids if isinstance(each, int)]))]
    size = (2, shape[0], min(shape[1], tokens_NT.shape[1]))
    drawn_2NT: Tensor = known_V[torch.randint(len(known_V), size, generator=torch.Generator().manual_seed(0))]
    drawn_2NT[1, 0, : len(special)] = special[: size[2]]
    return drawn_2NT


def _called(call: Call, x_NTC: Tensor) -> Tensor:
    """The output of a block for a call as the model makes it, with the entries that other blocks left in mappings."""
    arguments = {name: moved(value, x_NTC.device) for name, value in call.arguments.items()}
    return hidden_states_of(call.block.module(x_NTC, **arguments))
