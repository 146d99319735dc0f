"""How strongly the model's loss depends on each row of a block's matrices, by sending gradients back.

Shape suffixes: N sequences, T tokens, C channels of the residual stream, O rows (output channels).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from besa.counting.precision import widest
from besa.models.blocks import Block
from besa.models.units import Unit
from besa.observing.products import Products
from besa.system import ranks


@dataclass
class RowSensitivities:
    """Mean over tokens of the squared gradient at each output channel of a block's matrices.

    Sums of a pass are float32 and are added up as wide as the device computes, so that they do not depend on how
    sequences are divided among ranks (`ranks.total`).

    Args:
        block: the block or unit; its weights are not changed.
    """

    block: Block | Unit
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _tokens: dict[str, int] = field(default_factory=dict)

    def send_back(self, x_NTC: Tensor, seeds_NTC: Tensor) -> Tensor:
        """Send gradients backward through the block and add those at its matrices; returns those at its input.

        Args:
            x_NTC: inputs, on the block's device.
            seeds_NTC: gradients at the output.
        """
        x_NTC = x_NTC.detach().requires_grad_()
        with torch.enable_grad(), ExitStack() as stack:
            for block in self.block.blocks if isinstance(self.block, Unit) else (self.block,):
                stack.enter_context(Products(block.module, block.prunables, gradients=self._add))
            y_NTC = self.block(x_NTC)
        return torch.autograd.grad(y_NTC, x_NTC, seeds_NTC.to(y_NTC))[0]

    def rows(self, name: str) -> Tensor:
        """E[g²] (O,), float32, of the matrix `name`; zeros if no token reached it."""
        prunable = self.block.prunables[name]
        if name not in self._sums:
            return torch.zeros(prunable.rows, device=self.block.weight(name).device)
        return (self._sums[name] / self._tokens[name]).float()

    def add_up(self) -> None:
        """Add up the sums of all ranks, when every rank has sent back its sequences."""
        if ranks.count() == 1:
            return
        tokens = ranks.all_of(self._tokens)
        for name in sorted(set().union(*tokens)):
            if name not in self._sums:
                like = self.block.weight(name)
                self._sums[name] = like.new_zeros(len(like), dtype=widest(like.device))
            ranks.total(self._sums[name])
            self._tokens[name] = sum(of_rank.get(name, 0) for of_rank in tokens)

    def _add(self, name: str, gradient: Tensor) -> None:
        if not gradient.numel():
            return
        squares_O = gradient.float().square().reshape(-1, gradient.shape[-1]).sum(dim=0).to(widest(gradient.device))
        self._sums[name] = self._sums[name] + squares_O if name in self._sums else squares_O
        self._tokens[name] = self._tokens.get(name, 0) + gradient.numel() // gradient.shape[-1]
