"""Half-precision matrix products on a CPU without native support: in float32, many times as fast as torch's own.

Half-precision numbers are exact in float32, sums are float32 as torch's are, and the result is rounded once.

Shape suffixes: M rows and N columns of a product, K what it sums over.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

FEW = 8  # rows or columns of a product: for fewer, widening its factors costs about as much as it saves
PANEL = 2048  # rows, columns and what is summed over, at a time: so little is in memory twice
BYTES = 3 * 4 * PANEL**2  # of that, at most
aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}  # factors are the last two


@cache
def slow() -> frozenset[torch.dtype]:
    """The dtypes of half precision that oneDNN, and so torch, has no fast products of on this processor."""
    fast = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, supported in fast.items() if not supported)


def widened(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """While open, this thread's products of half precision are made in float32, those of backward passes too.

    Nothing changes for a model of another `dtype`, on a `device` other than the CPU, or on a processor that has units
    for that dtype: seeing every operator has its price.
    """
    needed = device.type == "cpu" and dtype in slow()
    return Widened() if needed else nullcontext()  # type: ignore[no-untyped-call]  # torch's


def linear(x_MK: Tensor, w_NK: Tensor) -> Tensor:
    """x Wᵀ (M, N) in the dtype of both, as fast as torch can."""
    return _product(x_MK, w_NK.T) if _widens(x_MK, w_NK.T) else functional.linear(x_MK, w_NK)


class Widened(TorchDispatchMode):
    """Sees what torch's functions come to, whoever calls them: `linear`, `einsum` and their gradients are products."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in PRODUCTS or not _widens(*args[-2:]):
            return func(*args, **(kwargs or {}))
        *added, left, right = args
        return _product(left, right, *added, **(kwargs or {}))


def _widens(left: Tensor, right: Tensor) -> bool:
    """Whether a product of a left (..., M, K) and a right factor (..., K, N) is faster in float32."""
    enough = min(left.shape[-2], right.shape[-1]) >= FEW
    return enough and left.dtype in slow() and left.dtype == right.dtype and left.is_cpu and right.is_cpu


def _product(left: Tensor, right: Tensor, added: Tensor | None = None, **factors: float) -> Tensor:
    """left right, or β added + α left right, for one pair of matrices or a stack of them; `added` may be broadcast."""
    out = left.new_empty(*left.shape[:-1], right.shape[-1])
    added = None if added is None else added.expand_as(out)
    if out.dim() == 2:
        _fill(out, left, right, added, **factors)
        return out
    for place, out_MN in enumerate(out):
        _fill(out_MN, left[place], right[place], None if added is None else added[place], **factors)
    return out


def _fill(
    out_MN: Tensor, left_MK: Tensor, right_KN: Tensor, added_MN: Tensor | None, beta: float = 1, alpha: float = 1
) -> None:
    """One panel after the other; each is summed up in float32 and rounded once."""
    inner, *others = _panels(left_MK.shape[1])
    for rows, columns in product(_panels(out_MN.shape[0]), _panels(out_MN.shape[1])):
        first = left_MK[rows, inner].float(), right_KN[inner, columns].float()
        if added_MN is None:
            sum_MN = torch.mm(*first)
        else:
            sum_MN = torch.addmm(added_MN[rows, columns].float(), *first, beta=beta, alpha=alpha)
        for other in others:
            sum_MN.addmm_(left_MK[rows, other].float(), right_KN[other, columns].float(), alpha=alpha)
        out_MN[rows, columns] = sum_MN


def _panels(length: int) -> list[slice]:
    return [slice(first, first + PANEL) for first in range(0, max(length, 1), PANEL)]
