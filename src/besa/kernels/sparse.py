"""Products with bitmask weights (docs/formats.md), without making the whole weight dense.

Kernels multiply a few rows of x, in C++ on the CPU and in Triton on a GPU. For many rows, arithmetic costs more than
memory traffic: panels of the weight are made dense one after the other, and torch multiplies them. This is also the
fallback without kernels, and the reference of their tests.

Shape suffixes: N rows of x, O rows and I columns of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from besa.kernels import sparse_native
from besa.storage.formats.bitmask import ROWS, Bitmask

MANY = 64  # rows of x
PANEL = 512  # rows of a weight


def multiplied(x_NI: Tensor, weight: Bitmask) -> Tensor:
    """x Wᵀ (N, O).

    Products are added in float32, in an order that differs between kernels. The error of y is at most I/8 + 16
    roundings of 2^-24 Σ|w||x|. Codes are multiplied as integers; for them, |w| is the larger of code and zero point,
    times the step. With AVX-512, x is rounded first: by at most 2^-22 of the largest number in its row, or in half
    precision by 2^-12 of the mean |x| if that is more. The value of a code is not rounded to the weight's dtype, unlike
    in a dense weight.

    Args:
        x_NI: in the weight's dtype.
        weight: on the device of x.
    """
    assert x_NI.dtype == weight.dtype
    if x_NI.is_cuda:
        from besa.kernels import sparse_gpu

        if sparse_gpu.serves(x_NI, weight):
            return sparse_gpu.multiply(x_NI, weight)
    elif 0 < len(x_NI) < MANY and sparse_native.serves(weight):
        return sparse_native.multiply(x_NI.float(), weight).to(x_NI.dtype)
    return by_panels(x_NI, weight)


def by_panels(x_NI: Tensor, weight: Bitmask) -> Tensor:
    """x Wᵀ (N, O) by torch, in its own precision, one dense panel at a time."""
    bands, step = -(-weight.shape[0] // ROWS), PANEL // ROWS
    panels = (slice(first, min(first + step, bands)) for first in range(0, bands, step))
    return torch.cat([linear(x_NI, _dense(weight, bands)) for bands in panels], dim=1)


def _dense(weight: Bitmask, bands: slice) -> Tensor:
    if sparse_native.serves(weight):
        return weight.dequantize(sparse_native.expand(weight, bands), bands)
    return weight.unpack_bands(bands)
