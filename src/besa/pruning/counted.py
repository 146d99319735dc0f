"""The pruned linears of a unit as counted in their final weights, for the record.

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


def linear_records(weights: Mapping[str, Tensor], linears: Mapping[str, RankedLinear]) -> dict[str, LinearRecord]:
    """The records of linears by full name. The host waits for the device twice.

    Args:
        weights: the pruned weights (O, I) by full name.
        linears: the same linears as they were when dense.
    """
    if not weights:
        return {}
    counted, sums = zip(*(_numbers(w_OI, linears[name].importance_OI) for name, w_OI in weights.items()), strict=True)
    counts_LS, kept_L = torch.stack(counted).tolist(), torch.stack(sums).tolist()
    records = {}
    for (name, w_OI), (zeros, *row_rates), kept in zip(weights.items(), counts_LS, kept_L, strict=True):
        records[name] = LinearRecord(
            name=name,
            shape=list(w_OI.shape),
            zeros=zeros,
            sparsity=zeros / w_OI.numel(),
            importance_kept=kept / max(w_OI.numel() - zeros, 1),
            reached=linears[name].reached,
            row_rates=row_rates,
        )
    return records


def _numbers(w_OI: Tensor, importance_OI: Tensor) -> tuple[Tensor, Tensor]:
    """The number of zeros and of rows in each bin of pruning rates (S,), int64; the importance of all kept weights."""
    zero_OI = w_OI == 0
    zeros_O = zero_OI.sum(dim=1)
    rows_S = histogram((zeros_O * HISTOGRAM_BINS // w_OI.shape[1]).clamp_max_(HISTOGRAM_BINS - 1), HISTOGRAM_BINS)
    kept_sum = importance_OI.masked_fill(zero_OI, 0).sum(dtype=widest(w_OI.device))
    return torch.cat([zeros_O.sum()[None], rows_S.to(torch.int64)]), kept_sum
