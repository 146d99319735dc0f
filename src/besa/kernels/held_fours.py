"""The order of prepacked codes for AVX-512: a bitmask by sixteen rows and four columns (held_avx512.cpp).

In the order of the file a register holds codes of one row, and summing up its groups takes as long as the products.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from besa.kernels import sparse_native
from besa.kernels.build import load
from besa.storage.formats.bitmask import PADDING, Bitmask

SOURCE, PATH = "held_avx512.cpp", "avx512"
MOST = 4  # rows of x: registers hold the sums of so many
ROWS = 16  # of a band


def most(kind: str, group: int) -> int:
    """Most rows of x that a kernel takes, for a kind of weights and a group size in columns (0: a whole row)."""
    return MOST if kind == "int4" and (group in (0, 32) or group % 64 == 0) else 0


def laid_out(weight: Bitmask) -> dict[str, Tensor]:
    """The heads of bands (their steps, codes of zero and masks), their codes, and where those begin.

    Heads are uint8, each of the same number of bytes. Codes are uint8, of all bands, and 64 bytes more; those of a band
    begin at `offsets` (bands + 1,), int64.
    """
    kernels = load(SOURCE)
    assert kernels is not None
    bands = -(-weight.shape[0] // ROWS)
    given, threads = sparse_native.passed(weight), ctypes.c_int64(torch.get_num_threads())
    offsets = torch.zeros(bands + 1, dtype=torch.int64, device="cpu")
    lengths = kernels[f"held_lengths_{PATH}"]
    lengths.restype = ctypes.c_int64
    size = lengths(ctypes.byref(given), ctypes.c_void_p(offsets[1:].data_ptr()), threads)
    offsets = offsets.cumsum(0)
    heads = torch.empty(bands * size, dtype=torch.uint8, device="cpu")
    codes = torch.zeros(int(offsets[-1]) + PADDING, dtype=torch.uint8, device="cpu")
    addresses = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (heads, offsets, codes))
    kernels[f"held_laid_out_{PATH}"](ctypes.byref(given), *addresses, threads)
    return {"masks": heads, "values": codes, "offsets": offsets}
