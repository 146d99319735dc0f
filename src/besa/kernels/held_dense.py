"""The order of held codes for AVX2: dense, two to a byte, chunk after chunk of a band of four rows.

There, moving the kept codes of a bitmask to their places takes longer than memory takes to give all codes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from besa.kernels import sparse_native
from besa.storage.formats.bitmask import ROWS, Bitmask

SOURCE, PATH = "sparse_avx2.cpp", "avx2"
MOST = 128  # rows of x: of 256, panels (`sparse`) take as long
CHUNK = 64  # columns
PANEL = 1024  # bands that are laid out at a time


def laid_out(weight: Bitmask) -> dict[str, Tensor]:
    """The codes: (bands, chunks, rows of a band, bytes), with zeros after the last row and column."""
    bands, chunks = len(weight.masks_BCR), -(-weight.shape[1] // CHUNK)
    codes_BCRH = torch.empty(bands, chunks, ROWS, CHUNK // 2, dtype=torch.uint8, device="cpu")
    for first in range(0, bands, PANEL):
        panel = slice(first, min(first + PANEL, bands))
        codes_OI = sparse_native.expand(weight, panel)
        codes_OI = pad(codes_OI, (0, -weight.shape[1] % CHUNK, 0, -len(codes_OI) % ROWS))
        pairs_BRCH = (codes_OI[:, ::2] | codes_OI[:, 1::2] << 4).view(-1, ROWS, chunks, CHUNK // 2)
        codes_BCRH[panel] = pairs_BRCH.transpose(1, 2)
    return {"values": codes_BCRH}
