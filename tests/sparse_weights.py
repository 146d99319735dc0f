"""Sparse weights of any size and kind, and inputs for them."""

import torch

from besa.quantization import Quantized
from besa.quantization.minmax import codes, extremes, grid
from besa.storage.formats import bitmask


def row_of_x(weight, batch, seed=0, spread=3):
    """Some numbers that differ much in size, as activations do, in the weight's dtype."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (spread * torch.randn(batch, weight.shape[1], generator=generator)).exp()
    return (torch.randn(batch, weight.shape[1], generator=generator) * sizes).clamp(-1000, 1000).to(weight.dtype)


def codes_weight(rows, columns, groups, bits, symmetric, seed=0):
    """A quantised weight of a size, half of whose weights are pruned, with rows that keep all and nothing."""
    w_OI = half_pruned(rows, columns, seed)
    steps = grid(*extremes(w_OI, groups), bits, symmetric)
    return bitmask.pack_codes(Quantized(codes(w_OI, steps).to(torch.uint8), steps, symmetric, torch.float32))


def half_pruned(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w_OI = torch.randn(rows, columns, generator=generator)
    w_OI[torch.rand(w_OI.shape, generator=generator) < 0.5] = 0
    w_OI[0], w_OI[-1] = 0, 1
    return w_OI
