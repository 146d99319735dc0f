"""The kernels' computations in plain torch: the reference of their tests, and the fallback without kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from besa.quantization.minmax import clipped_grid, codes, dequantized, logits_gradient, step_gradient

CHUNK = 1 << 22  # weights at a time, to bound temporary memory
HALVINGS = 20  # of the interval in which the shift of all rates lies
PRICE_HALVINGS = 64  # of the interval in which the price of a step lies
NEARLY = 1e-3  # ranks: so little below an integer counts as the integer


def masked(w_OI: Tensor, ranks_OI: Tensor, counts_O: Tensor, out_OI: Tensor) -> None:
    """See `besa.kernels.masked`."""
    torch.where(ranks_OI >= counts_O[:, None], w_OI, torch.zeros((), dtype=w_OI.dtype, device=w_OI.device), out=out_OI)


def binned(gradient_OI: Tensor, w_OI: Tensor, ranks_OI: Tensor, bins_I: Tensor, out_OB: Tensor) -> None:
    """See `besa.kernels.binned`; the terms of a sum are added in the order of their columns."""
    step = max(1, CHUNK // w_OI.shape[1])
    bins_I = bins_I.long()
    out_OB.zero_()
    for top in range(0, len(w_OI), step):
        part = slice(top, top + step)
        products_OI = gradient_OI[part].float() * w_OI[part].float()
        out_OB[part].scatter_add_(1, bins_I[ranks_OI[part].int()], products_OI)


def spread(w_OI: Tensor, kept_K: Tensor, out_OI: Tensor) -> None:
    """See `besa.kernels.spread`."""
    out_OI.zero_().masked_scatter_(w_OI != 0, kept_K.to(out_OI.dtype))


def gathered(w_OI: Tensor, x_OI: Tensor, out_K: Tensor) -> None:
    """See `besa.kernels.gathered`."""
    out_K.copy_(x_OI[w_OI != 0])


def pruned_ranks(alpha_R: Tensor, width_R: Tensor, share_R: Tensor, sparsity: float) -> Tensor:
    """See `besa.kernels.pruned_ranks`."""
    low, high = alpha_R.new_tensor(-1.0), alpha_R.new_tensor(1.0)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        below = (alpha_R + middle).clamp_(0, 1) @ share_R < sparsity
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    rates_R = (alpha_R + (low + high) / 2).clamp_(0, 1)
    return (rates_R * width_R + NEARLY).floor().long()


def cheapest_counts(ideal_R: Tensor, width_R: Tensor, least_R: Tensor, total: int) -> Tensor:
    """See `besa.kernels.cheapest_counts`."""

    def counts_at(price: Tensor) -> Tensor:
        counts_R = torch.floor(ideal_R + (price * width_R + 1) / 2)
        return torch.minimum(torch.maximum(counts_R, least_R), width_R)

    high = 2 * (ideal_R.abs() / width_R).max() + 4.0
    low = -high
    for _ in range(PRICE_HALVINGS):
        middle = (low + high) / 2
        fits = counts_at(middle).long().sum() <= total
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return counts_at(low - 0.5 / width_R.max())


def quantized(
    w_OI: Tensor, logits_2OG: Tensor, low_OG: Tensor, high_OG: Tensor, bits: int, symmetric: bool, out_OI: Tensor
) -> None:
    """See `besa.kernels.quantized`."""
    grid = clipped_grid(logits_2OG, low_OG, high_OG, bits, symmetric)
    out_OI.copy_(dequantized(codes(w_OI, grid), grid, out_OI.dtype))


def clipping_gradient(
    gradient_OI: Tensor,
    w_OI: Tensor,
    logits_2OG: Tensor,
    low_OG: Tensor,
    high_OG: Tensor,
    bits: int,
    symmetric: bool,
) -> Tensor:
    """See `besa.kernels.clipping_gradient`."""
    grid = clipped_grid(logits_2OG, low_OG, high_OG, bits, symmetric)
    slope_OG = step_gradient(gradient_OI, w_OI, grid)
    return logits_gradient(slope_OG, grid, logits_2OG, low_OG, high_OG, symmetric)


def swept(block_OB: Tensor, kept_OB: Tensor, factor_BB: Tensor, error_OB: Tensor) -> None:
    """See `besa.kernels.swept`."""
    for j in range(block_OB.shape[1]):
        pruned_O = block_OB[:, j].masked_fill(kept_OB[:, j], 0)
        error_OB[:, j] = pruned_O / factor_BB[j, j]
        block_OB[:, j:] -= error_OB[:, j : j + 1] * factor_BB[j, j:]
        block_OB[:, j].masked_fill_(~kept_OB[:, j], 0)  # exactly zero in spite of rounding


def add_squares(x_TI: Tensor, squares_I: Tensor) -> None:
    """See `besa.kernels.add_squares`."""
    squares_I += x_TI.float().square().sum(dim=0).to(squares_I.dtype)


def histogram(values: Tensor, bins: int) -> Tensor:
    """See `besa.kernels.histogram`."""
    values = values.flatten()
    if values.device.type == "cpu":
        return torch.bincount(values, minlength=bins)[:bins].clone()
    # bincount would let the host wait for the largest value. Integers add up to the same in any order.
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=values.device)
    return counts.scatter_add_(0, values.clamp_max(bins).long(), counts.new_ones(1).expand(len(values)))[:bins].clone()
