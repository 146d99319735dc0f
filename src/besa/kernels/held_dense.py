"""The order of prepacked codes for AVX2: dense, by eight rows and four bytes of each (held_avx2.cpp).

On AVX2, moving the kept codes of a bitmask to their places takes longer than reading all codes from memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from besa.kernels import sparse_native
from besa.storage.formats.bitmask import ROWS, Bitmask

SOURCE, PATH = "held_avx2.cpp", "avx2"
MOST = 128  # rows of x
HIGH = 8  # rows of a band
COLUMNS = {"int4": 8, "int8": 4}  # that four bytes have, by kind
PANEL = 1024  # bands that are laid out at a time


def most(kind: str, group: int) -> int:
    """Most rows of x that a kernel takes, for a kind of weights and a group size in columns (0: a whole row)."""
    return MOST if kind in COLUMNS and group % 8 == 0 else 0


def laid_out(weight: Bitmask) -> dict[str, Tensor]:
    """The bands: each group has its steps, its codes of zero (unless all are equal) and its codes; padded by zero rows.

    Codes of a group are (columns by four bytes, rows of a band, 4). Of four bits, the first four columns are the lower
    halves of the bytes. The only group of a row ends with zeros, where four such steps end.
    """
    assert weight.scales_OG is not None
    bands, groups = -(-weight.shape[0] // HIGH), weight.scales_OG.shape[1]
    heads = [_by_band(weight.scales_OG)] + ([] if weight.zeros_OG is None else [_by_band(weight.zeros_OG)])
    laid = []
    for first in range(0, bands, PANEL):
        panel = slice(first, min(first + PANEL, bands))
        file_bands = slice(panel.start * HIGH // ROWS, min(panel.stop * HIGH // ROWS, len(weight.masks_BCR)))
        codes_OI = sparse_native.expand(weight, file_bands)
        more = -codes_OI.shape[1] % (4 * COLUMNS[weight.kind]) if groups == 1 else 0
        codes_BRGC = pad(codes_OI, (0, more, 0, -len(codes_OI) % HIGH)).view(panel.stop - panel.start, HIGH, groups, -1)
        if weight.kind == "int4":
            low, high = codes_BRGC.unflatten(-1, (-1, 2, 4)).unbind(-2)
            codes_BRGC = (low | high << 4).flatten(-2)
        codes_BGC = codes_BRGC.unflatten(-1, (-1, 4)).permute(0, 2, 3, 1, 4).flatten(2)
        laid.append(torch.cat([*(head_BGH[panel] for head_BGH in heads), codes_BGC], dim=-1))
    return {"values": torch.cat(laid)}


def _by_band(values_OG: Tensor) -> Tensor:
    """A value for each row and group as bytes (bands, groups, those of a band), with zeros after the last row."""
    values_BHG = pad(values_OG, (0, 0, 0, -len(values_OG) % HIGH)).view(-1, HIGH, values_OG.shape[1])
    return values_BHG.transpose(1, 2).contiguous().view(torch.uint8)
