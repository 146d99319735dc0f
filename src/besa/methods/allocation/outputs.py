"""The error of each linear's own output, for methods that prune layer by layer.

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


def errors_of_linears(block: Block | Unit, x_NTC: Tensor, weights: Mapping[str, Tensor], plain: float = 0.0) -> Tensor:
    """Mean over linears of the error of their outputs (scalar), for the inputs that they have in the dense block.

    Args:
        block: runs with its own weights, without gradients.
        x_NTC: inputs of the block.
        weights: matrices (O, I) by full name that replace those of the linears; gradients reach them.
        plain: as in `reconstruction_error`.
    """
    (owner,) = block.blocks if isinstance(block, Unit) else (block,)
    watch = _Errors(owner.module, {name: owner.prunables[name] for name in weights}, weights, plain)
    with watch, torch.no_grad():
        block(x_NTC)
    # A linear that saw no token needs a gradient too: zero.
    unseen = [0.0 * weight.sum() for name, weight in weights.items() if name not in watch.seen]
    return torch.stack([*watch.errors, *unseen]).sum() / max(1, len(watch.errors))


class _Errors(Products):
    def __init__(
        self, block: nn.Module, prunables: Mapping[str, Prunable], weights: Mapping[str, Tensor], plain: float
    ) -> None:
        super().__init__(block, prunables, self._compare)
        self.errors: list[Tensor] = []
        self.seen: set[str] = set()
        self._weights = weights
        self._plain = plain
        parameters = dict(block.named_parameters())
        self._dense = {name: prunable.of(parameters[prunable.parameter]) for name, prunable in prunables.items()}

    def _compare(self, name: str, x: Tensor) -> None:
        if x.numel() == 0:
            return
        x_NTI = x.detach().reshape(1, -1, x.shape[-1])
        target_NTO = functional.linear(x_NTI, self._dense[name])
        with torch.enable_grad():
            y_NTO = functional.linear(x_NTI, self._weights[name].to(x.dtype))
            self.errors.append(reconstruction_error(y_NTO, target_NTO, self._plain))
        self.seen.add(name)
