"""Histograms of integers, for thresholds on more weights than can be sorted at once."""

from __future__ import annotations

import torch
from torch import Tensor


def histogram(values: Tensor, bins: int) -> Tensor:
    """How often each of 0, …, `bins` − 1 occurs; (bins,), int64.

    Args:
        values: integers of these, in any shape.
        bins: their number.
    """
    if values.device.type == "cpu":
        return torch.bincount(values.flatten(), minlength=bins)
    # bincount would let the host wait for the largest value. Integers add up to the same in any order.
    counts = torch.zeros(bins, dtype=torch.int64, device=values.device)
    return counts.scatter_add_(0, values.flatten().long(), counts.new_ones(1).expand(values.numel()))
