"""Products with bitmask weights (docs/formats.md), without making the whole weight dense if that can be helped.

Kernels multiply a few rows of x, in C++ on the CPU and in Triton on a GPU. For many rows, arithmetic costs more than
memory traffic: the weight is made dense for torch, on the CPU in panels that its caches hold, elsewhere as a whole, so
that nothing waits for the host. This is also the way without kernels, and the reference of their tests.

Shape suffixes: N rows of x, O rows and I columns of the weight.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import linear

from besa.kernels import sparse_native
from besa.kernels.operators import triton_works
from besa.storage.formats.bitmask import ROWS, Bitmask

MANY = 64  # rows of x
PANEL = 512  # rows of a weight


def multiplied(x_NI: Tensor, weight: Bitmask) -> Tensor:
    """x Wᵀ (N, O).

    Products are added in float32, in an order that differs between kernels. The error of y is at most I/8 + 16
    roundings of 2^-24 Σ|w||x|. Codes are multiplied on the CPU as integers; for them, |w| is the larger of code and
    zero point, times the step. With AVX-512 and on Arm, x is rounded first: by at most 2^-22 of the largest number in
    its row, or in half precision by 2^-12 of the mean |x| if that is more. The value of a code is not rounded to the
    weight's dtype, unlike in a dense weight and on a GPU.

    Args:
        x_NI: in the weight's dtype.
        weight: on the device of x.
    """
    assert x_NI.dtype == weight.dtype
    if x_NI.device.type == "cpu":
        if 0 < len(x_NI) < MANY and sparse_native.serves(weight):
            return sparse_native.multiply(x_NI.float(), weight).to(x_NI.dtype)
        return by_panels(x_NI, weight)
    kernels = _on_gpu(x_NI)
    if kernels is not None and 0 < len(x_NI) <= kernels.FEW:
        product: Tensor = kernels.multiply(x_NI, weight)
        return product
    return linear(x_NI, unpacked(weight))


def unpacked(weight: Bitmask) -> Tensor:
    """The dense weight (O, I), as `Bitmask.unpack` gives it."""
    kernels = _on_gpu(weight.values)
    dense: Tensor = weight.unpack() if kernels is None else kernels.unpack(weight)
    return dense


def _on_gpu(tensor: Tensor) -> ModuleType | None:
    """The kernels for the device of a tensor, if that is a GPU on which Triton works."""
    return import_module("besa.kernels.gpu.sparse") if tensor.is_cuda and triton_works(tensor.device) else None


def by_panels(x_NI: Tensor, weight: Bitmask) -> Tensor:
    """x Wᵀ (N, O) by torch, in its own precision, one dense panel at a time."""
    bands, step = -(-weight.shape[0] // ROWS), PANEL // ROWS
    panels = (slice(first, min(first + step, bands)) for first in range(0, bands, step))
    return torch.cat([linear(x_NI, _dense(weight, bands)) for bands in panels], dim=1)


def _dense(weight: Bitmask, bands: slice) -> Tensor:
    if sparse_native.serves(weight):
        return weight.dequantize(sparse_native.expand(weight, bands), bands)
    return weight.unpack_bands(bands)
