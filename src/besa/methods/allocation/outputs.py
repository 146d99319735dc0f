"""The error of every linear's own output: what methods look at that prune layer by layer.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from besa.models.blocks import Block
from besa.models.prunable import Prunable
from besa.models.units import Unit
from besa.observing.losses import reconstruction_error
from besa.observing.products import Products


def errors_of_linears(block: Block | Unit, x_NTC: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Mean over linears of the error of their outputs, for the inputs they have in the block as it is (scalar).

    Args:
        block: is run with its own weights, without gradients.
        x_NTC: input of the block.
        weights: matrices (O, I) by full name that the linears would have instead; gradients reach them.
    """
    (owner,) = block.blocks if isinstance(block, Unit) else (block,)
    watched = _Errors(owner.module, {name: owner.prunables[name] for name in weights}, weights)
    with watched, torch.no_grad():
        block(x_NTC)
    # A linear that saw no token here must get a gradient all the same: nothing.
    unseen = [0.0 * weight.sum() for name, weight in weights.items() if name not in watched.found]
    return torch.stack([*watched.errors, *unseen]).sum() / max(1, len(watched.errors))


class _Errors(Products):
    def __init__(self, block: nn.Module, prunables: Mapping[str, Prunable], weights: Mapping[str, Tensor]) -> None:
        super().__init__(block, prunables, self._seen)
        self.errors: list[Tensor] = []
        self.found: set[str] = set()
        self._weights = weights
        parameters = dict(block.named_parameters())
        self._own = {name: prunable.of(parameters[prunable.parameter]) for name, prunable in prunables.items()}

    def _seen(self, name: str, x: Tensor) -> None:
        if x.numel() == 0:
            return
        x_NTI = x.detach().reshape(1, -1, x.shape[-1])
        target_NTO = functional.linear(x_NTI, self._own[name])
        with torch.enable_grad():
            y_NTO = functional.linear(x_NTI, self._weights[name].to(x.dtype))
            self.errors.append(reconstruction_error(y_NTO, target_NTO))
        self.found.add(name)
