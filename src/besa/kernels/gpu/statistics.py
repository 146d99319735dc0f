"""Sums of squares over tokens, and histograms."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from besa.kernels.gpu.launching import launch

PART = 256  # tokens that a program sums up
TOKENS, CHANNELS = 16, 128  # of a tile
VALUES = 1024  # that a program counts


@triton.jit(do_not_specialize=["tokens"])
def _part_squares(x, parts, tokens, channels, PART: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    sums = tl.zeros((TOKENS, CHANNELS), dtype=tl.float32)
    for passed in range(0, PART, TOKENS):
        token = tl.program_id(1) * PART + passed + tl.arange(0, TOKENS)
        inside = (token < tokens)[:, None] & (channel < channels)[None, :]
        place = token.to(tl.int64)[:, None] * channels + channel[None, :]
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        sums += values * values
    tl.store(parts + tl.program_id(1) * channels + channel, tl.sum(sums, axis=0), mask=channel < channels)


@triton.jit(do_not_specialize=["n_parts"])
def _add_parts(parts, squares, n_parts, channels, CHANNELS: tl.constexpr):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    sums = tl.load(squares + channel, mask=inside, other=0.0)
    part = 0
    while part < n_parts:
        sums += tl.load(parts + part * channels + channel, mask=inside, other=0.0).to(tl.float64)
        part += 1
    tl.store(squares + channel, sums, mask=inside)


@triton.jit
def _histogram(values, counts, n, bins, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + at, mask=at < n, other=0)
    tl.atomic_add(counts + value, tl.full((BLOCK,), 1, tl.int64), mask=(at < n) & (value < bins), sem="relaxed")


def add_squares(x_TI: Tensor, squares_I: Tensor) -> None:
    """See `besa.kernels.add_squares`: parts of the tokens first, then the parts, each in a fixed order."""
    tokens, channels = x_TI.shape
    n_parts, blocks = triton.cdiv(tokens, PART), triton.cdiv(channels, CHANNELS)
    parts = torch.empty(n_parts, channels, device=x_TI.device)
    launch(
        _part_squares,
        (blocks, n_parts),
        x_TI.contiguous(),
        parts,
        tokens,
        channels,
        PART=PART,
        TOKENS=TOKENS,
        CHANNELS=CHANNELS,
    )
    launch(_add_parts, (blocks,), parts, squares_I, n_parts, channels, CHANNELS=CHANNELS)


def histogram(values: Tensor, bins: int) -> Tensor:
    """See `besa.kernels.histogram`: integers add up to the same in any order."""
    counts = torch.zeros(bins, dtype=torch.int64, device=values.device)
    n = values.numel()
    if n:
        launch(_histogram, (triton.cdiv(n, VALUES),), values.contiguous(), counts, n, bins, BLOCK=VALUES)
    return counts
