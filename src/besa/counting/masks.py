"""Masks from ranks: the pruning order of each row, and the hard mask.

Shape suffixes: O rows (output channels), I columns (input channels).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 22  # weights ranked at a time, so that 8 bytes for each take at most 32 MiB


def rank(importance_OI: Tensor, w_OI: Tensor, group: int | None = None) -> Tensor:
    """Rank of each weight within its row, 0 = pruned first; (O, I), int16 if the width allows, else int32.

    Weights that are zero already come first, then the others by ascending importance; of equal ones, that of the lower
    column. The order is the same on every machine, because each weight sorts by one integer: the bits of its importance
    above, its column below.

    Args:
        importance_OI: non-negative float32 importance.
        w_OI: the weight itself.
        group: columns in each group of an n:m pattern. The least important weight of every group comes first, then the
            second of every group, and so on. None without such a pattern.
    """
    rows, width = importance_OI.shape
    dtype = torch.int16 if width <= torch.iinfo(torch.int16).max else torch.int32
    if group is not None:
        places_OI = rank(importance_OI.reshape(-1, group), w_OI.reshape(-1, group)).reshape(rows, width).to(dtype)
        groups = width // group
        return places_OI * groups + torch.arange(width, dtype=torch.int32, device=w_OI.device).to(dtype) // group
    ranks_OI = torch.empty(rows, width, dtype=dtype, device=w_OI.device)
    positions_I = torch.arange(width, dtype=dtype, device=w_OI.device)
    step = max(1, CHUNK // width)
    for top in range(0, rows, step):
        part = slice(top, top + step)
        order = _order(importance_OI[part], w_OI[part])
        ranks_OI[part].scatter_(1, order, positions_I.expand(order.shape[0], -1))
    return ranks_OI


def _order(importance_OI: Tensor, w_OI: Tensor) -> Tensor:
    """Columns (O, I), int64, of each row in pruning order."""
    bits_OI = pruning_keys(importance_OI, w_OI)
    if bits_OI.device.type != "cpu":
        return bits_OI.sort(dim=1, stable=True).indices
    # Numpy's vectorised integer sort is about 20 times torch's here. It gives no places, so the key has the column too.
    keys_OI = (bits_OI.long() << 32) | torch.arange(w_OI.shape[1])
    return torch.from_numpy(np.sort(keys_OI.numpy(), axis=1)) & 0xFFFFFFFF


def pruning_keys(importance_OI: Tensor, w_OI: Tensor) -> Tensor:
    """Integers (O, I), int32, that sort as weights are pruned: non-negative floats sort like their bits.

    Adding 1 keeps 0 for the weights that are zero already.
    """
    return (importance_OI.float().contiguous().view(torch.int32) + 1).masked_fill_(w_OI == 0, 0)


def hard_mask(ranks_OI: Tensor, counts_O: Tensor) -> Tensor:
    """Boolean mask (O, I), True = kept, that prunes the `counts_O[o]` lowest ranks of row o."""
    return ranks_OI >= counts_O.to(ranks_OI.dtype)[:, None]


def largest(importance_OI: Tensor, w_OI: Tensor, counts_O: Tensor, group: int | None = None) -> Tensor:
    """`hard_mask(rank(importance_OI, w_OI, group), counts_O)`, to the bit, in half of the time on a CPU.

    There, sorted numbers alone say where each row is cut. Rows in which weights tie at the cut are ranked.
    """
    if group is not None or importance_OI.device.type != "cpu":
        return hard_mask(rank(importance_OI, w_OI, group), counts_O)
    bits_OI = pruning_keys(importance_OI, w_OI)
    sorted_OI = torch.from_numpy(np.sort(bits_OI.numpy(), axis=1))
    cuts_O1 = sorted_OI.gather(1, counts_O.sub(1).clamp_min_(0)[:, None])
    kept_OI = bits_OI > cuts_O1.masked_fill_(counts_O[:, None] == 0, -1)
    tied_O = kept_OI.sum(dim=1) != w_OI.shape[1] - counts_O
    if tied_O.any():
        kept_OI[tied_O] = hard_mask(rank(importance_OI[tied_O], w_OI[tied_O]), counts_O[tied_O])
    return kept_OI
