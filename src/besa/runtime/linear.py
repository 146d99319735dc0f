"""A linear layer that computes with the bitmask of its weight.

Shape suffixes: N tokens, O rows (output channels), I columns (input channels).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from besa.errors import BesaError
from besa.kernels import sparse
from besa.storage.formats.bitmask import Bitmask
from besa.storage.formats.container import MASK, OFFSETS, SCALE, VALUES, ZERO, tensors_of


class SparseLinear(nn.Module):
    """y = x Wᵀ + b with the packed W, for inference; its buffers are named as the tensors of the container.

    Args:
        weight: W, kept as `bitmask`; its tensors may be memory-mapped and are not copied.
        bias: b (O,), or None.
    """

    def __init__(self, weight: Bitmask, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.bitmask = weight
        self.out_features, self.in_features = weight.shape
        for name, tensor in tensors_of(weight).items():
            self.register_buffer(name, tensor)
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """W (O, I), unpacked at each access, for families that read a weight without calling its linear (Mamba)."""
        return sparse.unpacked(self.bitmask)

    def forward(self, x: Tensor) -> Tensor:
        """Output (…, O) for inputs (…, I) of the dtype of the weight.

        Raises:
            BesaError: `x` requires gradients.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise BesaError("Packed linears compute no gradients: train the dense model, which `besa unpack` writes.")
        y = sparse.multiplied(x.reshape(-1, self.in_features), self.bitmask).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """As of nn.Linear, with the bits of a weight."""
        rows, columns = self.bitmask.shape
        return f"{columns}, {rows}, kind={self.bitmask.kind}, bits={8 * self.bitmask.nbytes / (rows * columns):.2f}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """Move to another device; the dtype cannot change.

        Raises:
            BesaError: the dtype would change.
        """
        if fn(torch.empty(0, dtype=self.bitmask.dtype)).dtype != self.bitmask.dtype:
            raise BesaError("Packed linears keep their dtype: ask for another one with besa.load(..., dtype=).")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        buffers = dict(self.named_buffers(recurse=False))
        self.bitmask = replace(
            self.bitmask,
            masks_BCR=buffers[MASK],
            values=buffers[VALUES],
            offsets=buffers[OFFSETS],
            scales_OG=buffers.get(SCALE),
            zeros_OG=buffers.get(ZERO),
        )
        return self
