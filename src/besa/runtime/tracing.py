"""Products of packed layers as operators of torch: what `torch.compile`, `torch.export` and `torch.jit.trace` record.

None of them can look into a kernel, nor can a mode that sees each operator, such as one for tensors without memory.
The layers therefore call these operators then, and the kernels themselves otherwise, which costs less at each call.

Shape suffixes: O rows (output channels), I columns (input channels).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, is_in_torch_dispatch_mode

from besa.counting.widening import Widened
from besa.kernels import row_codes, sparse
from besa.storage.formats.bitmask import Bitmask
from besa.storage.formats.row_codes import RowCodes


def tracing() -> bool:
    """Whether torch records operators, or a dispatch mode other than besa's own sees them."""
    if torch.compiler.is_compiling() or is_tracing():
        return True
    return is_in_torch_dispatch_mode() and any(
        not isinstance(mode, Widened) for mode in _get_current_dispatch_mode_stack()
    )


def sparse_product(x: Tensor, weight: Bitmask) -> Tensor:
    """x Wᵀ (…, O) for inputs (…, I); see `besa.kernels.sparse.multiplied`."""
    tensors = (weight.masks_BCR, weight.values, weight.offsets, weight.scales_OG, weight.zeros_OG)
    y: Tensor = _sparse_product(x, *tensors, list(weight.shape), weight.bits)
    return y


def coded_product(x: Tensor, matrix: RowCodes) -> Tensor:
    """x Wᵀ (…, O) for inputs (…, I); see `besa.kernels.row_codes.multiplied`."""
    y: Tensor = _coded_product(x, matrix.codes_OI, matrix.steps_O1)
    return y


@torch.library.custom_op("besa_runtime::sparse_product", mutates_args=())
def _sparse_product(
    x: Tensor,
    masks_BCR: Tensor,
    values: Tensor,
    offsets: Tensor,
    scales_OG: Tensor | None,
    zeros_OG: Tensor | None,
    shape: list[int],
    bits: int | None,
) -> Tensor:
    rows, columns = shape
    weight = Bitmask((rows, columns), masks_BCR, values, offsets, scales_OG, zeros_OG, bits)
    return sparse.multiplied(x.reshape(-1, columns), weight).view(*x.shape[:-1], rows)


@_sparse_product.register_fake
def _(x: Tensor, masks_BCR: Tensor, values: Tensor, offsets: Tensor, *others: object) -> Tensor:
    shape = others[2]
    assert isinstance(shape, list)
    return x.new_empty(*x.shape[:-1], shape[0])


@torch.library.custom_op("besa_runtime::coded_product", mutates_args=())
def _coded_product(x: Tensor, codes_OI: Tensor, steps_O1: Tensor) -> Tensor:
    rows, columns = codes_OI.shape
    return row_codes.multiplied(x.reshape(-1, columns), RowCodes(codes_OI, steps_O1)).view(*x.shape[:-1], rows)


@_coded_product.register_fake
def _(x: Tensor, codes_OI: Tensor, steps_O1: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes_OI.shape[0])
