"""Products with bitmask weights (docs/formats.md), without making the whole weight dense where possible.

Kernels multiply a few rows of x, in C++ on the CPU and in Triton on a GPU. For many rows, arithmetic costs more than
memory traffic. On the CPU, tiles unpack some of the weight into the caches, where all rows of x meet it; or the weight
is made dense for torch, in panels that the caches hold. Which is faster is measured once on a machine. Elsewhere the
weight is made dense as a whole, so that nothing waits for the host. This is also the way without kernels, and the
reference of their tests.

Shape suffixes: N rows of x, O rows and I columns of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from besa.counting.widening import linear
from besa.kernels import choosing, held, sparse_native, tiles_native
from besa.kernels.operators import triton_works
from besa.quantization import Grid, Quantized
from besa.storage.formats import bitmask
from besa.storage.formats.bitmask import ROWS, Bitmask

PANEL = 512  # rows of a weight
EXAMPLE = (1024, 2048)  # rows and columns of the weight by which ways are compared


def multiplied(x_NI: Tensor, weight: Bitmask) -> Tensor:
    """x Wᵀ (N, O).

    Products are added in float32, in an order that differs between kernels. The error of y is at most I/8 + 16
    roundings of 2^-24 Σ|w||x|. Few rows of x are multiplied with codes as integers on the CPU; for them, |w| is the
    larger of code and zero point, times the step. With AVX-512, AVX2 and on Arm, x is rounded first: by at most 2^-22
    of the largest number in its row, or in half precision by 2^-12 of the mean |x| if that is more. The value of a code
    is not rounded to the weight's dtype then, unlike for many rows, in a dense weight and on a GPU.

    Args:
        x_NI: in the weight's dtype.
        weight: on the device of x.
    """
    assert x_NI.dtype == weight.dtype
    if x_NI.device.type == "cpu":
        return _on_cpu(x_NI, weight)
    kernels = _on_gpu(x_NI)
    if kernels is not None and 0 < len(x_NI) <= kernels.FEW:
        product: Tensor = kernels.multiply(x_NI, weight)
        return product
    return linear(x_NI, unpacked(weight))


class Product:
    """x Wᵀ for one weight, as `multiplied` gives it; what the kernels need for one row of x is prepared once.

    Codes are prepacked where that pays (`held`), which serves several rows as well.

    Args:
        weight: W.
    """

    def __init__(self, weight: Bitmask) -> None:
        self._weight, self._columns, self._dtype = weight, weight.shape[1], weight.dtype
        self._most = 0  # rows of x that meet what is made ready
        if weight.dtype != torch.float16 and sparse_native.serves(weight):
            self._most = max(1, held.most(weight))
        self._held: held.Product | None = None
        self._of_threads: dict[int, sparse_native.Product | held.Product] = {}

    @property
    def prepacked(self) -> bool:
        """Whether it computes with a copy of the numbers, so that changing them in place changes nothing."""
        return self._held is not None

    def __call__(self, x: Tensor) -> Tensor:
        """Output (…, O) for inputs (…, I) in the weight's dtype, on its device."""
        few = 0 < x.numel() <= self._most * self._columns
        if few and x.size(-1) == self._columns and x.is_cpu and x.dtype == self._dtype:
            product = self._now()
            if x.numel() == self._columns or product is self._held:
                return product(x)
        return multiplied(x.reshape(-1, self._columns), self._weight).view(*x.shape[:-1], self._weight.shape[0])

    def entry(self, dtype: torch.dtype) -> sparse_native.Entry | None:
        """The product with one row of x of a dtype, for C code; None if there is no kernel for it."""
        return self._now().entry if self._most and dtype == self._dtype else None

    def _now(self) -> sparse_native.Product | held.Product:
        """What is prepared for the present number of torch's threads."""
        threads = torch.get_num_threads()
        if threads not in self._of_threads:
            self._of_threads[threads] = self._made(threads)
        return self._of_threads[threads]

    def _made(self, threads: int) -> sparse_native.Product | held.Product:
        """What is prepared for a number of threads."""
        if not held.pays(self._weight, threads):
            return sparse_native.Product(self._weight, 1, self._dtype)
        self._held = self._held or held.Product(self._weight)
        return self._held


def unpacked(weight: Bitmask) -> Tensor:
    """The dense weight (O, I), as `Bitmask.unpack` gives it."""
    kernels = _on_gpu(weight.values)
    dense: Tensor = weight.unpack() if kernels is None else kernels.unpack(weight)
    return dense


def _on_gpu(tensor: Tensor) -> ModuleType | None:
    """The kernels for the device of a tensor, if that is a GPU on which Triton works."""
    return import_module("besa.kernels.gpu.sparse") if tensor.is_cuda and triton_works(tensor.device) else None


def _on_cpu(x_NI: Tensor, weight: Bitmask) -> Tensor:
    if not len(x_NI) or not sparse_native.serves(weight):
        return by_panels(x_NI, weight)
    if len(x_NI) == 1:
        return by_rows(x_NI, weight)
    names = _fastest(weight.kind, weight.dtype, torch.get_num_threads())
    return WAYS[names[choosing.place(len(x_NI))]](x_NI, weight)


def by_rows(x_NI: Tensor, weight: Bitmask) -> Tensor:
    """x Wᵀ (N, O) by the kernels that hold a few rows of x in registers."""
    if x_NI.dtype == torch.float16:
        return sparse_native.multiply(x_NI.float(), weight).to(x_NI.dtype)
    return sparse_native.multiply(x_NI, weight)


def by_tiles(x_NI: Tensor, weight: Bitmask) -> Tensor:
    """x Wᵀ (N, O) by the kernels that unpack some of the weight for all rows of x."""
    return tiles_native.multiply(x_NI, weight, dtype=x_NI.dtype)


def by_panels(x_NI: Tensor, weight: Bitmask) -> Tensor:
    """x Wᵀ (N, O) by torch, in its own precision, one dense panel at a time."""
    bands, step = -(-weight.shape[0] // ROWS), PANEL // ROWS
    panels = (slice(first, min(first + step, bands)) for first in range(0, bands, step))
    return torch.cat([linear(x_NI, _dense(weight, bands)) for bands in panels], dim=1)


def _dense(weight: Bitmask, bands: slice) -> Tensor:
    if sparse_native.serves(weight):
        return weight.dequantize(sparse_native.expand(weight, bands), bands)
    return weight.unpack_bands(bands)


WAYS: dict[str, Callable[[Tensor, Bitmask], Tensor]] = {"rows": by_rows, "tiles": by_tiles, "panels": by_panels}


@cache
def _fastest(kind: str, dtype: torch.dtype, threads: int) -> list[str]:
    """The fastest way to multiply so many rows of x by a weight of a kind, for each of `choosing.COUNTS`."""
    assert threads == torch.get_num_threads()
    ways = [name for name in WAYS if name != "tiles" or tiles_native.paths()]
    sources = [*sparse_native.SOURCES.values(), *tiles_native.SOURCES.values()]
    return choosing.fastest(f"bitmask {kind} {dtype}", sources, ways, partial(_works, ways, kind, dtype))


def _works(ways: list[str], kind: str, dtype: torch.dtype) -> Mapping[str, Callable[[int], choosing.Work]]:
    weight, generator = _example(kind, dtype), torch.Generator().manual_seed(0)

    def work(way: str, count: int) -> choosing.Work:
        x_NI = torch.randn(count, weight.shape[1], generator=generator).to(dtype)
        return partial(WAYS[way], x_NI, weight)

    return {way: partial(work, way) for way in ways}


def _example(kind: str, dtype: torch.dtype) -> Bitmask:
    """A random weight of a kind, half of it pruned."""
    generator = torch.Generator().manual_seed(0)
    kept_OI = torch.rand(EXAMPLE, generator=generator) < 0.5
    if not kind.startswith("int"):
        return bitmask.pack(torch.randn(EXAMPLE, generator=generator).to(dtype) * kept_OI)
    bits = int(kind.removeprefix("int"))
    codes_OI = torch.randint(2**bits, EXAMPLE, generator=generator, dtype=torch.uint8)
    zero = 2 ** (bits - 1)
    step_O1 = torch.ones(EXAMPLE[0], 1)
    grid = Grid(step_O1, torch.full_like(step_O1, zero), bits)
    return bitmask.pack_codes(Quantized(codes_OI.masked_fill(~kept_OI, zero), grid, True, dtype))
