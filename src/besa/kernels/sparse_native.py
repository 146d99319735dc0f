"""The kernels of sparse_avx512.cpp, sparse_avx2.cpp, sparse_neon.cpp and sparse.cpp, called on torch's tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from besa.kernels import build
from besa.kernels.build import load, runnable
from besa.kernels.fetching import past_caches
from besa.kernels.reading import USUAL, Way, Work, fastest
from besa.quantization import Grid, Quantized
from besa.storage.formats.bitmask import PADDING, ROWS, Bitmask, pack, pack_codes

SOURCES = {
    "avx512bf16": "sparse_avx512.cpp",
    "avx512": "sparse_avx512.cpp",
    "neonbf16": "sparse_neon.cpp",
    "neondot": "sparse_neon.cpp",
    "neon": "sparse_neon.cpp",
    "avx2": "sparse_avx2.cpp",
    "plain": "sparse.cpp",
}
SCALES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WORKS = {torch.float32: "multiply", torch.bfloat16: "halves"}  # by the dtype of x and y
TRIED = ("avx512bf16", "avx512")  # have several ways to read a weight
LARGE = 1 << 16  # bytes of a weight for which the fastest way is looked for: a model of small ones is large, too
PIECE, PIECES = 1 << 22, 48  # bytes of weights that are read to find it, and their number: more than caches hold
COLUMNS = 4096  # of them
WIDEST = 1 << 20  # columns up to which the sum of products with a digit stays below 2^31


class _Weight(ctypes.Structure):
    """A bitmask as a C structure for the kernels."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("masks", "values", "offsets")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_void_p) for name in ("scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("scale_type", "groups", "zero", "bands", "ahead", "first", "past")),
    ]


class Entry(NamedTuple):
    """A product as C code calls it: kernel(weight, x, 1, y, threads) for one row of x.

    Attributes:
        kernel: address of the function.
        weight: address of the weight.
        product: must live as long as the addresses are used.
    """

    kernel: int
    weight: int
    product: object


def address(kernel: Any) -> int:
    """Address of a kernel, for C code."""
    return int(ctypes.cast(kernel, ctypes.c_void_p).value or 0)


@cache
def paths() -> list[str]:
    """The instruction sets of this processor for which there are kernels, best first; none without a compiler."""
    return [name for name, source in SOURCES.items() if runnable(source, [name])]


def serves(weight: Bitmask) -> bool:
    """Whether there is a kernel for weights of this kind and grid."""
    group = weight.shape[1] // (1 if weight.scales_OG is None else weight.scales_OG.shape[1])
    whole = group == weight.shape[1] or group % 64 == 0 or group in (4, 8, 16, 32)
    return weight.values.device.type == "cpu" and whole and weight.shape[1] <= WIDEST and bool(paths())


def multiply(x_NI: Tensor, weight: Bitmask, path: str = "", way: Way | None = None) -> Tensor:
    """y = x Wᵀ (N, O), in the dtype of x. Sums are float32, and rounded in the end.

    Args:
        x_NI: float32 or bfloat16; for a bfloat16 weight, its numbers must be exact in bfloat16.
        weight: on the CPU, with at least one row.
        path: instruction set; by default the best.
        way: to read the weight for one row of x; by default the fastest, if the weight is large.
    """
    return Product(weight, len(x_NI), x_NI.dtype, path, way)(x_NI)


class Product:
    """y = x Wᵀ for one weight and a number of rows of x; all that does not depend on x is prepared once.

    Args:
        weight: as of `multiply`, as are `path` and `way`.
        rows: of x.
        dtype: of x and y, float32 or bfloat16.
        path: see `multiply`.
        way: see `multiply`.
    """

    def __init__(self, weight: Bitmask, rows: int, dtype: torch.dtype, path: str = "", way: Way | None = None) -> None:
        assert dtype in WORKS
        path, self._threads = path or paths()[0], torch.get_num_threads()
        if way is None:
            sought = rows == 1 and weight.nbytes >= LARGE and path in TRIED
            way = _fastest(weight.kind, path, self._threads) if sought else USUAL
        self._weight, self._rows, self._shape = weight, rows, weight.shape  # the weight's tensors must live
        self._passed = passed(weight, way)
        self._address = ctypes.addressof(self._passed)
        self._function = _function(WORKS[dtype], weight.kind, path)

    @property
    def entry(self) -> Entry:
        """The product for C code, in the dtype of x."""
        return Entry(address(self._function), self._address, self)

    def __call__(self, x: Tensor) -> Tensor:
        """Output (…, O) for inputs (…, I) of so many rows."""
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self._shape[0]))
        self._function(self._address, x.data_ptr(), self._rows, y.data_ptr(), self._threads)
        return y


def expand(weight: Bitmask, bands: slice, path: str = "") -> Tensor:
    """The values, or codes, of some bands (O, I), dense."""
    rows = min(ROWS * bands.stop, weight.shape[0]) - ROWS * bands.start
    out_OI = weight.values.new_empty(rows, weight.shape[1])
    expand, given = _function("expand", weight.kind, path or paths()[0]), passed(weight)
    expand(ctypes.addressof(given), bands.start, bands.stop, out_OI.data_ptr(), torch.get_num_threads())
    return out_OI


@cache
def _fastest(kind: str, path: str, threads: int) -> Way:
    """The fastest way to read large weights of a kind on this machine."""
    kernels = load(SOURCES[path])
    assert kernels is not None

    def works() -> list[Work]:
        x_NI = torch.ones(1, COLUMNS)
        return [partial(multiply, x_NI, weight, path) for weight in samples(kind)]

    return fastest(f"{Path(kernels._name).name} {kind} {path} {threads}", works)


def samples(kind: str, group: int = 128) -> list[Bitmask]:
    """Half-sparse weights of a kind, `PIECES` with `PIECE` bytes each: a small one, many times over.

    Args:
        kind: as of `Bitmask`.
        group: columns that have a step, of codes of four bits; 0 for those of a row.
    """
    generator = torch.Generator().manual_seed(0)
    kept_OI = (torch.rand(64, COLUMNS, generator=generator) < 0.5).float()
    if kind.startswith("int"):
        bits, groups = (4, COLUMNS // group if group else 1) if kind == "int4" else (8, 1)
        zero = 2 ** (bits - 1)
        grid = Grid(torch.ones(64, groups), torch.full((64, groups), float(zero)), bits)
        small = pack_codes(Quantized((kept_OI + zero).to(torch.uint8), grid, True, torch.bfloat16))
    else:
        small = pack(kept_OI.to(getattr(torch, kind)))
    times, end = -(-PIECE // small.nbytes), int(small.offsets[-1])
    values = small.values.view(torch.uint8)
    offsets = (small.offsets[:-1] + end * torch.arange(times)[:, None]).flatten()
    return [
        Bitmask(
            (64 * times, COLUMNS),
            small.masks_BCR.repeat(times, 1, 1),
            torch.cat([values[:-PADDING].repeat(times), values[-PADDING:]]).view(small.values.dtype),
            torch.cat([offsets, offsets.new_tensor([end * times])]),
            None if small.scales_OG is None else small.scales_OG.repeat(times, 1),
            bits=small.bits,
        )
        for _ in range(PIECES)
    ]


@cache
def _function(work: str, kind: str, path: str) -> Callable[..., None]:
    """A kernel that takes the address of a weight, and whole numbers."""
    arguments = [ctypes.c_void_p, *[ctypes.c_int64] * 4]
    found: Callable[..., None] = build.function(SOURCES[path], f"{work}_{kind}_{path}", arguments)
    return found


def passed(weight: Bitmask, way: Way = USUAL) -> _Weight:
    """The weight as a C structure, and how it is read. Its tensors must live until the kernel returns."""
    scales_OG = weight.scales_OG
    tensors = (weight.masks_BCR, weight.values, weight.offsets)
    assert all(tensor.is_contiguous() for tensor in tensors)
    return _Weight(
        *(tensor.data_ptr() for tensor in tensors),
        *weight.shape,
        None if scales_OG is None else scales_OG.data_ptr(),
        None if weight.zeros_OG is None else weight.zeros_OG.data_ptr(),
        0 if scales_OG is None else SCALES[scales_OG.dtype],
        1 if scales_OG is None else scales_OG.shape[1],
        0 if weight.bits is None else 2 ** (weight.bits - 1),
        *way,
        past_caches(),
    )


def passed_dense(w_OI: Tensor) -> _Weight:
    """A dense weight as a C structure, for kernels that take both; its tensor must live until the kernel returns."""
    return _Weight(None, w_OI.data_ptr(), None, *w_OI.shape, None, None, 0, 1, 0)
