"""Prepacked quantised weights: codes rearranged in memory so that a few rows of x are multiplied faster.

The order depends on the processor (`held_fours`, `held_dense`). Prepacked codes (`held` in names) take memory besides
the bitmask, which still serves many rows of x. Whether they pay is measured once on a machine.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from besa.kernels import build, held_dense, held_fours, reading, sparse_native
from besa.kernels.build import load, runnable
from besa.kernels.once import once
from besa.kernels.reading import USUAL, Way, Work
from besa.storage.formats.bitmask import Bitmask

ORDERS = {"avx512bf16": held_fours, "avx512": held_fours, "avx2": held_dense}  # by instruction set
GAIN = 1.05  # times as fast as the bitmask, at least: the memory must be worth it
FEW = 4  # rows of x, at most, that count besides one
ROUNDS = 5


def most(weight: Bitmask) -> int:
    """Most rows of x that a kernel takes; 0 if there is no kernel."""
    order = _order()
    if weight.scales_OG is None or order is None or not sparse_native.serves(weight):
        return 0
    rows: int = order.most(weight.kind, _group(weight))
    return rows


def pays(weight: Bitmask, threads: int) -> bool:
    """Whether prepacked codes multiply a row of x so much faster that they are worth their memory."""
    return most(weight) > 0 and weight.nbytes >= sparse_native.LARGE and _gains(weight.kind, _group(weight), threads)


class Product:
    """y = x Wᵀ for one weight and up to `most` rows of x.

    Sums are as exact as those of `sparse_native.Product`, and add up in another order.

    Args:
        weight: one that has a kernel.
        way: to read it for one row of x; by default the fastest, if it is large.
    """

    def __init__(self, weight: Bitmask, way: Way | None = None) -> None:
        order, threads = _order(), torch.get_num_threads()
        assert order is not None
        if way is None:
            sought = weight.nbytes >= sparse_native.LARGE and sparse_native.paths()[0] in sparse_native.TRIED
            way = _fastest(weight.kind, _group(weight), threads) if sought else USUAL
        self._weight, self._held = weight, order.laid_out(weight)  # the tensors of both must live
        self._passed = sparse_native.passed(weight, way)
        for name, tensor in self._held.items():
            setattr(self._passed, name, tensor.data_ptr())
        self._address = ctypes.addressof(self._passed)
        self._functions = {
            dtype: _function(order, f"{work}_held_{weight.kind}") for dtype, work in sparse_native.WORKS.items()
        }

    def __call__(self, x: Tensor) -> Tensor:
        """Output (…, O) for inputs (…, I) of float32 or bfloat16."""
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self._weight.shape[0]))
        self._functions[x.dtype](
            self._address, x.data_ptr(), x.numel() // x.size(-1), y.data_ptr(), torch.get_num_threads()
        )
        return y

    def read(self, way: Way) -> None:
        """Choose how the weight is read from now on for one row of x."""
        self._passed.bands, self._passed.ahead, self._passed.first = way

    @property
    def entry(self) -> sparse_native.Entry:
        """The product for C code, in the dtype of the weight: float32 or bfloat16."""
        return sparse_native.Entry(sparse_native.address(self._functions[self._weight.dtype]), self._address, self)


def _order() -> ModuleType | None:
    """The order of prepacked codes for this processor; None if there is none."""
    paths = sparse_native.paths()
    order = ORDERS.get(paths[0]) if paths else None
    return order if order is not None and runnable(order.SOURCE, [order.PATH]) else None


def _group(weight: Bitmask) -> int:
    """Columns that share a quantisation step; 0 if all of a row do."""
    assert weight.scales_OG is not None
    groups = weight.scales_OG.shape[1]
    return 0 if groups == 1 else weight.shape[1] // groups


@cache
def _function(order: ModuleType, name: str) -> Callable[..., None]:
    arguments = [ctypes.c_void_p, *[ctypes.c_int64] * 4]
    found: Callable[..., None] = build.function(order.SOURCE, f"{name}_{order.PATH}", arguments)
    return found


def _subject(kind: str, group: int, threads: int) -> str:
    """What is measured, in words, with the name of what it depends on."""
    order = _order()
    assert order is not None
    kernels = load(order.SOURCE)
    assert kernels is not None
    return f"codes {Path(kernels._name).name} {kind} {group} {threads}"


@cache
def _fastest(kind: str, group: int, threads: int) -> Way:
    """The fastest way to read large weights of a kind with this group size on this machine."""

    def works() -> list[Work]:
        x_NI = torch.ones(1, sparse_native.COLUMNS)
        return [partial(_read, product, x_NI) for product in map(_held_usual, sparse_native.samples(kind, group))]

    return reading.fastest(_subject(kind, group, threads), works)


def _held_usual(weight: Bitmask) -> Product:
    return Product(weight, USUAL)


def _read(product: Product, x_NI: Tensor, way: Way) -> None:
    product.read(way)
    product(x_NI)


@cache
def _gains(kind: str, group: int, threads: int) -> bool:
    """Whether prepacked codes are `GAIN` times as fast as bitmasks on this machine."""
    subject = f"whether held, by one row and few: {_subject(kind, group, threads)}"
    gains: bool = once(subject, [], lambda found: isinstance(found, bool), partial(_measured, kind, group))
    return gains


def _measured(kind: str, group: int) -> bool:
    """Time both in turn, several times, with one row of x and with a few; both numbers of rows count alike.

    The least time of each piece counts, as other processes can only add to it. Where others share the memory, its speed
    changes from hour to hour; one row of x depends on it, a few rows hardly do.
    """
    weights, gain = sparse_native.samples(kind, group), 1.0
    held = [Product(weight) for weight in weights]
    for rows in (1, min(FEW, most(weights[0]))):
        x_NI = torch.ones(rows, sparse_native.COLUMNS)
        packed = [sparse_native.Product(weight, rows, x_NI.dtype) for weight in weights]
        ways: list[Sequence[Product | sparse_native.Product]] = [held, packed]
        seconds = [[float("inf")] * len(weights) for _ in ways]
        for _ in range(ROUNDS):
            for products, least in zip(ways, seconds, strict=True):
                for i, product in enumerate(products):
                    began = time.perf_counter()
                    product(x_NI)
                    least[i] = min(least[i], time.perf_counter() - began)
        gain *= sum(seconds[1]) / sum(seconds[0])
    return gain > GAIN**2
