"""Records of a unit's pruned linears, counted in their final weights.

Shape suffixes: O rows, I columns, L linears, S numbers of a linear.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from besa.counting.precision import widest
from besa.kernels import histogram
from besa.methods.allocation import RankedLinear
from besa.record import HISTOGRAM_BINS, LinearRecord

MANY = 1 << 20  # zeros: float32, which is all that some devices have, counts to 2²⁴


def linear_records(weights: Mapping[str, Tensor], linears: Mapping[str, RankedLinear]) -> dict[str, LinearRecord]:
    """The records of linears by full name. The host waits for the device once.

    Args:
        weights: the pruned weights (O, I) by full name.
        linears: the same linears as they were when dense.
    """
    if not weights:
        return {}
    numbers_LS = torch.stack([_numbers(w_OI, linears[name].importance_OI) for name, w_OI in weights.items()])
    records = {}
    for (name, w_OI), (many, rest, kept_sum, *row_rates) in zip(weights.items(), numbers_LS.tolist(), strict=True):
        zeros = int(many) * MANY + int(rest)
        records[name] = LinearRecord(
            name=name,
            shape=list(w_OI.shape),
            zeros=zeros,
            sparsity=zeros / w_OI.numel(),
            importance_kept=kept_sum / max(w_OI.numel() - zeros, 1),
            reached=linears[name].reached,
            row_rates=[int(rows) for rows in row_rates],
        )
    return records


def _numbers(w_OI: Tensor, importance_OI: Tensor) -> Tensor:
    """Numbers (S,) of a linear: zeros (divided by `MANY`, and the remainder), importance kept, rows by bin of rates."""
    zero_OI = w_OI == 0
    zeros_O = zero_OI.sum(dim=1)
    rows_S = histogram((zeros_O * HISTOGRAM_BINS // w_OI.shape[1]).clamp_max_(HISTOGRAM_BINS - 1), HISTOGRAM_BINS)
    zeros, dtype = zeros_O.sum(), widest(w_OI.device)
    kept_sum = importance_OI.masked_fill(zero_OI, 0).sum(dtype=dtype)
    return torch.cat([torch.stack([(zeros // MANY).to(dtype), (zeros % MANY).to(dtype), kept_sum]), rows_S.to(dtype)])
