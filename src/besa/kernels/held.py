"""Codes of four bits, held dense in memory to be multiplied by up to `MOST` rows of x.

With AVX2, moving the kept codes of a bitmask to their places takes longer than memory takes to give all codes. So these
are laid out once, two to a byte, in the order in which the kernel reads them. They take memory besides the bitmask,
which serves many rows of x as before. Whether that pays is measured once on a machine.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from besa.kernels import sparse_native
from besa.kernels.build import load
from besa.kernels.once import once
from besa.storage.formats.bitmask import ROWS, Bitmask

PATH = "avx2"  # the only instruction set that has a kernel
CHUNK = 64  # columns
PANEL = 1024  # bands that are laid out at a time
GAIN = 1.25  # times as fast as the bitmask, at least: the memory must be worth it
ROUNDS = 5
MOST = 128  # rows of x: of 256, panels (`sparse`) take as long


def serves(weight: Bitmask) -> bool:
    """Whether there is a kernel for weights of this kind and grid: a step for 32 columns, for 64 k, or for a row."""
    if weight.kind != "int4" or not sparse_native.serves(weight) or sparse_native.paths()[0] != PATH:
        return False
    assert weight.scales_OG is not None
    groups = weight.scales_OG.shape[1]
    return groups == 1 or weight.shape[1] // groups == 32 or weight.shape[1] // groups % CHUNK == 0


def pays(weight: Bitmask, threads: int) -> bool:
    """Whether a row of x is multiplied so much faster by held codes that they are worth their memory."""
    return serves(weight) and weight.nbytes >= sparse_native.LARGE and _gains(threads)


class Product:
    """y = x Wᵀ for one weight and any number of rows of x.

    Sums are as exact as those of `sparse_native.Product`, and add up in another order.

    Args:
        weight: one that `serves` allows.
    """

    def __init__(self, weight: Bitmask) -> None:
        self._weight, self._codes = weight, laid_out(weight)  # the weight's tensors must live
        self._passed = sparse_native.passed(weight)
        self._passed.values = self._codes.data_ptr()
        self._address = ctypes.addressof(self._passed)
        self._functions = {dtype: _function(work) for dtype, work in sparse_native.WORKS.items()}

    def __call__(self, x: Tensor) -> Tensor:
        """Output (…, O) for inputs (…, I) of float32 or bfloat16."""
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self._weight.shape[0]))
        self._functions[x.dtype](
            self._address, x.data_ptr(), x.numel() // x.size(-1), y.data_ptr(), torch.get_num_threads()
        )
        return y

    @property
    def entry(self) -> sparse_native.Entry:
        """The product for C code, in the dtype of the weight: float32 or bfloat16."""
        return sparse_native.Entry(sparse_native.address(self._functions[self._weight.dtype]), self._address, self)


def laid_out(weight: Bitmask) -> Tensor:
    """The codes, two to a byte: (bands, chunks, rows of a band, bytes), with zeros after the last row and column."""
    bands, chunks = len(weight.masks_BCR), -(-weight.shape[1] // CHUNK)
    codes_BCRH = torch.empty(bands, chunks, ROWS, CHUNK // 2, dtype=torch.uint8, device="cpu")
    for first in range(0, bands, PANEL):
        panel = slice(first, min(first + PANEL, bands))
        codes_OI = sparse_native.expand(weight, panel)
        codes_OI = pad(codes_OI, (0, -weight.shape[1] % CHUNK, 0, -len(codes_OI) % ROWS))
        pairs_BRCH = (codes_OI[:, ::2] | codes_OI[:, 1::2] << 4).view(-1, ROWS, chunks, CHUNK // 2)
        codes_BCRH[panel] = pairs_BRCH.transpose(1, 2)
    return codes_BCRH


@cache
def _function(work: str) -> Callable[..., None]:
    kernels = load(sparse_native.SOURCES[PATH])
    assert kernels is not None
    function = kernels[f"{work}_held_{PATH}"]
    function.argtypes, function.restype = [ctypes.c_void_p, *[ctypes.c_int64] * 4], None
    return function


@cache
def _gains(threads: int) -> bool:
    """Whether held codes are `GAIN` times as fast as bitmasks on this machine."""
    kernels = load(sparse_native.SOURCES[PATH])
    assert kernels is not None
    subject = f"whether codes of four bits are held dense {kernels._name} {threads}"
    gains: bool = once(subject, [], lambda found: isinstance(found, bool), _measured)
    return gains


def _measured() -> bool:
    """Both in turn, some times; the least time counts, as other processes only ever add to it."""
    weights = sparse_native.samples("int4")
    x_NI = torch.ones(1, sparse_native.COLUMNS)
    held = [Product(weight) for weight in weights]
    packed = [sparse_native.Product(weight, 1, x_NI.dtype) for weight in weights]
    seconds = {True: float("inf"), False: float("inf")}
    for _ in range(ROUNDS):
        for way, products in ((True, held), (False, packed)):
            began = time.perf_counter()
            for product in products:
                product(x_NI)
            seconds[way] = min(seconds[way], time.perf_counter() - began)
    return GAIN * seconds[True] < seconds[False]
