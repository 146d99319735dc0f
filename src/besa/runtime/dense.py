"""A dense linear layer of a packed model: the head, and what was not worth packing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from besa.kernels import dense
from besa.kernels.sparse_native import Entry
from besa.runtime.derivatives import wanted
from besa.runtime.tracing import tracing


class DenseLinear(nn.Linear):
    """A linear that uses besa's kernels; where a derivative is wanted or torch is tracing, it is torch's own.

    Args:
        linear: whose weight and bias it shares, and its mode.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.training = linear.training

    def plain(self) -> nn.Linear:
        """The linear of torch, with the same weight, bias and mode."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def entry(self, dtype: torch.dtype) -> Entry | None:
        """The product with one row of x of a dtype, for C code; None if `forward` computes it in another way."""
        product = dense.product(self.weight) if dtype == self.weight.dtype else None
        return None if product is None else product.entry

    def forward(self, x: Tensor) -> Tensor:
        """Output (…, O) for inputs (…, I) of the dtype of the weight."""
        if tracing() or wanted(x, self.weight) or x.dtype != self.weight.dtype or not dense.serves(self.weight):
            return super().forward(x)
        y = dense.multiplied(x.reshape(-1, self.in_features), self.weight).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias
