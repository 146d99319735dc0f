"""Clipping that is searched: of a few shares of a group's range, the one that rounding serves best.

Shape suffixes: O rows, I columns, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from besa.quantization.minmax import Grid, dequantized, extremes, grid, kept_codes

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)  # of the range


def best_grid(
    w_OI: Tensor, squares_I: Tensor, groups: int, bits: int, symmetric: bool, shares: Sequence[float]
) -> Grid:
    """The grid of each group with the least Σ squares · (W − Q(W))²; of equal ones, that of the larger share.

    Args:
        w_OI: a pruned weight in the dtype of the model, to which the steps are rounded.
        squares_I: Σ x² of each column.
        groups: number of groups of consecutive columns in a row.
        bits: N.
        symmetric: whether the code of zero is the middle one.
        shares: of the range, to choose from.
    """
    low_OG, high_OG = extremes(w_OI, groups)
    best: Grid | None = None
    least_OG = torch.empty(0)
    for share in shares:
        exact = grid(share * low_OG, share * high_OG, bits, symmetric)
        tried = Grid(exact.step_OG.to(w_OI.dtype).float(), exact.zero_OG, bits)
        change_OI = dequantized(kept_codes(w_OI, tried), tried, w_OI.dtype).float() - w_OI.float()
        error_OG = (change_OI.square() * squares_I.float()).view(*low_OG.shape, -1).sum(dim=2)
        if best is None:
            best, least_OG = tried, error_OG
            continue
        lower_OG = error_OG < least_OG
        least_OG = torch.where(lower_OG, error_OG, least_OG)
        best = Grid(
            torch.where(lower_OG, tried.step_OG, best.step_OG), torch.where(lower_OG, tried.zero_OG, best.zero_OG), bits
        )
    assert best is not None
    return best
