"""A linear layer that computes from the bitmask of its weight.

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
    """y = x Wᵀ + b with W as it is packed, for inference; its tensors are named as in the container.

    Args:
        weight: W; its tensors may be memory-mapped, and are not copied. It is `bitmask` afterwards.
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
        """W (O, I), made dense anew: for families that read a weight and do not call its linear, as Mamba's do."""
        return self.bitmask.unpack()

    def forward(self, x: Tensor) -> Tensor:
        """Output (…, O) for inputs (…, I) of the dtype of the weight.

        Raises:
            BesaError: gradients are asked for.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise BesaError("Packed linears compute no gradients: train the dense model, which `besa unpack` writes.")
        y = sparse.multiplied(x.reshape(-1, self.in_features), self.bitmask).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """As of nn.Linear, with what a weight takes."""
        rows, columns = self.bitmask.shape
        return f"{columns}, {rows}, kind={self.bitmask.kind}, bits={8 * self.bitmask.nbytes / (rows * columns):.2f}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """Move to another device; the layout is that of one dtype.

        Raises:
            BesaError: another dtype is asked for.
        """
        if fn(torch.empty(0, dtype=self.bitmask.dtype)).dtype != self.bitmask.dtype:
            raise BesaError("Packed linears keep their dtype: ask for another one with besa.load(..., dtype=).")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        own = dict(self.named_buffers(recurse=False))
        self.bitmask = replace(
            self.bitmask,
            masks_BCR=own[MASK],
            values=own[VALUES],
            offsets=own[OFFSETS],
            scales_OG=own.get(SCALE),
            zeros_OG=own.get(ZERO),
        )
        return self
