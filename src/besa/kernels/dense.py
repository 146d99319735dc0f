"""Products with dense weights on the CPU: those of the head, and of linears that were not pruned.

Torch's own product of one row reads a weight at half the memory bandwidth or less, and in float32 its sums depend on
the weight's address. Kernels for few rows of x read it at the full bandwidth, and always serve one row; for more rows,
there are tiles. Which is faster is measured once on a machine.

Shape suffixes: N rows of x, O rows and I columns of the weight.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from torch import Tensor

from besa.counting.widening import linear
from besa.kernels import build, choosing, sparse_native, tiles_native
from besa.kernels.build import load, runnable
from besa.kernels.fetching import past_caches
from besa.storage.formats.bitmask import FLOATS

SOURCE = "dense.cpp"
EIGHTS = "eights"  # float32 products, eight at a time
EXAMPLE = (1024, 2048)  # rows and columns of the weights by which ways are compared
COPIES = 16  # of them: a head is read from memory, not from a cache


def multiplied(x_NI: Tensor, w_OI: Tensor) -> Tensor:
    """x Wᵀ (N, O), in the dtype of both.

    Products are added in float32, in an order that differs between kernels. The error of y before it is rounded is at
    most I/8 + 16 roundings of 2^-24 Σ|w||x|.
    """
    assert x_NI.dtype == w_OI.dtype
    if not len(x_NI) or not serves(w_OI):
        return linear(x_NI, w_OI)
    if len(x_NI) == 1:
        return by_rows(x_NI, w_OI)
    names = _fastest(w_OI.dtype, torch.get_num_threads())
    return WAYS[names[choosing.place(len(x_NI))]](x_NI, w_OI)


class Product:
    """x Wᵀ for one row of x, for C code: as `by_rows` gives it.

    Args:
        w_OI: W, float32 or bfloat16, that `serves` allows.
    """

    def __init__(self, w_OI: Tensor) -> None:
        self._weight = w_OI  # must live
        self._passed = sparse_native.passed_dense(w_OI)
        self._passed.past = past_caches()

    @property
    def entry(self) -> sparse_native.Entry:
        """The product for C code, in the dtype of the weight."""
        kernels, dtype = load(SOURCE), self._weight.dtype
        assert kernels is not None
        function = kernels[f"alike_{str(dtype).removeprefix('torch.')}_{tiles_native.path_of(dtype, paths())}"]
        return sparse_native.Entry(sparse_native.address(function), ctypes.addressof(self._passed), self)


def product(w_OI: Tensor) -> Product | None:
    """The product with one row of x for C code; None if there is no kernel for it."""
    return Product(w_OI) if w_OI.dtype in sparse_native.WORKS and serves(w_OI) else None


@cache
def paths() -> list[str]:
    """Paths of the kernels for few rows, best first: those of `tiles_native.paths`; with AVX2 alone, `eights`."""
    return runnable(SOURCE, (tiles_native.PAIRS, tiles_native.SINGLES, EIGHTS))


def serves(w_OI: Tensor) -> bool:
    """Whether there is a kernel for a weight."""
    return w_OI.device.type == "cpu" and w_OI.dtype in FLOATS and w_OI.is_contiguous() and bool(paths())


def multiply(x_NI: Tensor, w_OI: Tensor, path: str = "") -> Tensor:
    """y = x Wᵀ (N, O), float32, by the kernels for few rows.

    Args:
        x_NI: in the weight's dtype, with at least one row.
        w_OI: that `serves` allows.
        path: one of `paths`; by default the best.
    """
    path = path or tiles_native.path_of(x_NI.dtype, paths())
    x_NI = (x_NI if path == tiles_native.PAIRS else x_NI.float()).contiguous()
    rows, columns = w_OI.shape
    y_NO = x_NI.new_empty(len(x_NI), rows, dtype=torch.float32)
    function = _function(f"dense_{str(w_OI.dtype).removeprefix('torch.')}_{path}")
    numbers = (len(x_NI), columns, rows, y_NO.data_ptr(), past_caches(), torch.get_num_threads())
    function(w_OI.data_ptr(), x_NI.data_ptr(), *numbers)
    return y_NO


@cache
def _function(name: str) -> Callable[..., None]:
    """A kernel, which takes addresses and whole numbers."""
    found: Callable[..., None] = build.function(SOURCE, name, [ctypes.c_int64] * 8)
    return found


def by_rows(x_NI: Tensor, w_OI: Tensor) -> Tensor:
    """x Wᵀ (N, O) by the kernels for few rows."""
    return multiply(x_NI, w_OI).to(x_NI.dtype)


def by_tiles(x_NI: Tensor, w_OI: Tensor) -> Tensor:
    """x Wᵀ (N, O) by the kernels for many rows."""
    return tiles_native.multiply(x_NI, w_OI, dtype=x_NI.dtype)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"rows": by_rows, "tiles": by_tiles, "torch": linear}


@cache
def _fastest(dtype: torch.dtype, threads: int) -> list[str]:
    """The fastest way to multiply so many rows of x by a weight, for each of `choosing.COUNTS`."""
    assert threads == torch.get_num_threads()
    ways = [name for name in WAYS if name != "tiles" or tiles_native.paths()]
    return choosing.fastest(
        f"dense {dtype}",
        [SOURCE, *tiles_native.SOURCES.values()],
        ways,
        partial(_works, ways, dtype),
    )


def _works(ways: list[str], dtype: torch.dtype) -> Mapping[str, Callable[[int], choosing.Work]]:
    generator = torch.Generator().manual_seed(0)
    copies = [torch.randn(EXAMPLE, generator=generator).to(dtype) for _ in range(COPIES)]

    def work(way: str, count: int) -> choosing.Work:
        x_NI = torch.randn(count, EXAMPLE[1], generator=generator).to(dtype)
        return lambda: [WAYS[way](x_NI, w_OI) for w_OI in copies[: max(1, COPIES // count)]]

    return {way: partial(work, way) for way in ways}
