"""From learned rates to whole numbers of zeros that add up exactly.

Shape suffixes: R rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from besa import kernels
from besa.counting.budget import check_room
from besa.counting.precision import widest
from besa.errors import BesaError


def apportion(rates_R: Tensor, widths_R: Tensor, total: int, least_R: Tensor) -> Tensor:
    """Integer zeros per row that add up to `total` and change the learned rates least; (R,), int64.

    Minimises Σ_r width_r·(n_r / width_r − rate_r)² over integers least_r ≤ n_r ≤ width_r with Σ n_r = total. The cost
    is convex in each n_r. It is therefore optimal to raise one count at a time, always the cheapest one; of equal ones,
    that of the lower row. A bisection on the price of a step takes all but the last few steps at once. The host waits
    for the device once.

    Args:
        rates_R: learned pruning rate of each row, any real number; the other tensors are on its device.
        widths_R: weights in each row, int64, positive.
        total: zeros to distribute.
        least_R: zeros that each row already has, int64.

    Raises:
        BesaError: `total` is less than the zeros already there, or more than the number of weights, or a rate is not
            finite.
    """
    rows, dtype = len(rates_R), widest(rates_R.device)
    least, weights, finite = torch.stack([least_R.sum(), widths_R.sum(), rates_R.isfinite().all()]).tolist()
    if not finite:
        raise BesaError("Learned pruning rates are NaN or infinite: lower allocation.travel in the recipe.")
    check_room(weights, total, least)
    width_R = widths_R.to(dtype)
    ideal_R = rates_R.to(dtype) * width_R
    counts_R = kernels.cheapest_counts(ideal_R, width_R, least_R.to(dtype), total)
    cost_R = torch.where(counts_R < width_R, (2 * (counts_R - ideal_R) + 1) / width_R, torch.inf)
    more_R = torch.arange(rows, device=cost_R.device) < total - counts_R.long().sum()  # at most one more step per row
    return counts_R.scatter_add_(0, cost_R.argsort(stable=True), more_R.to(dtype)).long()


def counted(
    rates: Mapping[str, Tensor], widths: Mapping[str, int], total: int, least: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`apportion` over the rows of several matrices: zeros of each row (O,), int64, by name in the order of `rates`.

    Args:
        rates: learned pruning rate of each row (O,).
        widths: weights in a row.
        total: zeros to distribute.
        least: zeros that each row already has (O,), int64.

    Raises:
        BesaError: as of `apportion`.
    """
    widths_R = torch.cat([torch.full_like(least[name], widths[name]) for name in rates])
    counts_R = apportion(torch.cat(list(rates.values())), widths_R, total, torch.cat([least[name] for name in rates]))
    return dict(zip(rates, counts_R.split([len(rates_O) for rates_O in rates.values()]), strict=True))
