"""A whole model that learns: all its blocks have their weights at once, and float32 values stand in for some of them.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from besa.models import sizes
from besa.models.blocks import Block
from besa.models.ends import logits_of
from besa.models.kept import spread
from besa.models.mixtures import chosen_experts
from besa.models.prunable import everywhere
from besa.system.machine import multiplying_in


class Whole:
    """The blocks of a model and what follows them, as functions of values by name.

    A value stands in for a parameter of the model, in whose dtype it is used. Linears have the full names of prunable
    matrices, all other parameters the full names that they have in the model. The value of a linear may be a vector of
    its kept weights, those that are not zero in the model.

    Args:
        model: with all its weights on one device.
        blocks: of the model.
    """

    def __init__(self, model: PreTrainedModel, blocks: Sequence[Block]) -> None:
        self._model = model
        self.blocks = list(blocks)
        self._block_of = {name: block for block in blocks for name in block.prunables}
        self._inner = {  # names of parameters within each block by name of the block, with their full names
            block.name: {inner: f"{block.name}.{inner}" for inner, _ in block.module.named_parameters()}
            for block in blocks
        }
        self._places = {name: block.name for name, block in self._block_of.items()}
        self._places |= {name: block for block, inner in self._inner.items() for name in inner.values()}

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.blocks[0].module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the model knows."""
        return sizes.vocabulary(self._model)

    @property
    def vectors(self) -> list[str]:
        """Full names of norms and biases: all parameters of one dimension but those of embeddings and head."""
        ends = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        fixed = {id(parameter) for module in ends if module is not None for parameter in module.parameters()}
        return [
            name
            for name, parameter in self._model.named_parameters()
            if parameter.dim() == 1 and id(parameter) not in fixed
        ]

    def own(self, name: str) -> Tensor:
        """The model's own tensor of that name; writing to it changes the model."""
        if name in self._block_of:
            return self._block_of[name].weight(name).detach()
        parameter: Tensor = self._model.get_parameter(name)
        return parameter.detach()

    def place(self, name: str) -> str:
        """The name of the block that a parameter or linear belongs to; empty outside the blocks."""
        return self._places.get(name, "")

    @torch.no_grad()
    def states(self, x_NTC: Tensor, values: Mapping[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
        """The inputs (N, T, C) of every block, and last the output of the last block.

        Args:
            x_NTC: inputs of the first block, on the device.
            values: by name.
            dtype: to multiply in.
        """
        states = [x_NTC]
        for block in self.blocks:
            states.append(self._run(block, states[-1], values, dtype))
        return states

    def send_back(
        self, states: list[Tensor], gradient_NTC: Tensor, values: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        """Send a gradient back through all blocks; each value adds up its own.

        Every block runs again, so that memory holds what one block keeps for its gradients.

        Args:
            states: as from `states`; they are freed on the way.
            gradient_NTC: at the output of the last block.
            values: by name.
            dtype: to multiply in.
        """
        states.pop()
        for block in reversed(self.blocks):
            x_NTC = states.pop().detach().requires_grad_()
            with torch.enable_grad():
                y_NTC = self._run(block, x_NTC, values, dtype)
            y_NTC.backward(gradient_NTC.to(y_NTC.dtype))
            assert x_NTC.grad is not None
            gradient_NTC = x_NTC.grad

    def logits(self, tokens_NT: Tensor, y_NTC: Tensor, values: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Logits (N, T, V) for the output of the last block; gradients reach it and the values outside the blocks.

        Args:
            tokens_NT: that were read.
            y_NTC: output of the last block.
            values: by name.
            dtype: to multiply in.
        """
        outside = {name: self._cast(name, value) for name, value in values.items() if not self.place(name)}
        with self._multiplying_in(dtype):
            return logits_of(self._model, self.blocks, tokens_NT, y_NTC, outside)

    def _run(self, block: Block, x_NTC: Tensor, values: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        weights = {name: self._cast(name, values[name]) for name in block.prunables if name in values}
        inner_names = self._inner[block.name].items()
        others = {inner: self._cast(name, values[name]) for inner, name in inner_names if name in values}
        with self._multiplying_in(dtype):  # one block at a time: it keeps every weight that it converts
            return block(x_NTC, weights, others)

    def _cast(self, name: str, value: Tensor) -> Tensor:
        own = self.own(name)
        return spread(value, own) if value.dim() < own.dim() else value.to(own.dtype)

    def _multiplying_in(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        return multiplying_in(dtype, self._model.dtype, self.device)


def head_share(model: PreTrainedModel, blocks: Sequence[Block]) -> float:
    """The cost of a model's head, as a share of a forward pass through all its blocks.

    Of experts that a router chooses from, as many count as a token gets.
    """
    config = model.config.get_text_config()
    inside: float = sum(parameter.numel() for block in blocks for parameter in block.module.parameters())
    for block in blocks:
        routed = [(everywhere(name), one.numel) for name, one in block.prunables.items() if one.routed]
        experts = Counter(kind for kind, _ in routed)
        for kind, numel in routed:
            inside -= numel * (1 - min(chosen_experts(config) or experts[kind], experts[kind]) / experts[kind])
    return sizes.vocabulary(model) * sizes.channels(model) / inside
