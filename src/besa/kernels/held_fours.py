"""The order of held codes for AVX-512: a bitmask by sixteen rows and four columns (held_avx512.cpp).

In the order of the file a register is of one row, and closing its groups takes as long as the products.
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
SHORT, LONG = 32, 64  # columns that are read at a time: where a step is for 32, and elsewhere


def laid_out(weight: Bitmask) -> dict[str, Tensor]:
    """The heads of bands, which are their steps, codes of zero and masks; their codes, and where those begin."""
    assert weight.scales_OG is not None
    kernels = load(SOURCE)
    assert kernels is not None
    rows, columns = weight.shape
    groups, bands = weight.scales_OG.shape[1], -(-rows // ROWS)
    read = SHORT if groups > 1 and columns == groups * SHORT else LONG
    masks = -(-columns // groups // read) * read * ROWS // 8
    head = groups * (ROWS * (weight.scales_OG.itemsize + (weight.zeros_OG is not None)) + masks)
    given, threads = sparse_native.passed(weight), ctypes.c_int64(torch.get_num_threads())
    offsets = torch.zeros(bands + 1, dtype=torch.int64, device="cpu")
    kernels[f"held_lengths_{PATH}"](ctypes.byref(given), ctypes.c_void_p(offsets[1:].data_ptr()), threads)
    offsets = offsets.cumsum(0)
    heads = torch.empty(bands * head, dtype=torch.uint8, device="cpu")
    codes = torch.zeros(int(offsets[-1]) + PADDING, dtype=torch.uint8, device="cpu")
    addresses = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (heads, offsets, codes))
    kernels[f"held_laid_out_{PATH}"](ctypes.byref(given), *addresses, threads)
    return {"masks": heads, "values": codes, "offsets": offsets}
