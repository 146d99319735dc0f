"""The sparsity and size of a checkpoint, counted in its files."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from pydantic import BaseModel

from besa.checkpoint.walk import StoredWeight, stored_weights
from besa.models.source import Source, weight_paths
from besa.progress import Progress, silent


class LinearContents(BaseModel):
    """One prunable weight as it is stored; `parts` has its bytes by purpose."""

    name: str
    shape: list[int]
    zeros: int
    sparsity: float
    bytes: int
    parts: dict[str, int]


class BlockContents(BaseModel):
    """One decoder block: its prunable weights together."""

    name: str
    weights: int
    zeros: int
    sparsity: float
    bytes: int
    parts: dict[str, int]
    bits_per_weight: float


class Contents(BaseModel):
    """A checkpoint: totals over the prunable weights, each block, each linear.

    `revision` is its commit, if it came from the Hugging Face Hub.
    """

    model: str
    revision: str | None = None
    weights: int
    zeros: int
    sparsity: float
    bytes: int
    parts: dict[str, int]
    bits_per_weight: float
    file_bytes: int
    blocks: list[BlockContents]
    linears: list[LinearContents]


def inspect(source: Source, progress: Progress = silent) -> Contents:
    """Count zeros and bytes of every prunable weight of a checkpoint; a Hugging Face id is downloaded first.

    Raises:
        BesaError: the model cannot be fetched, or as `stored_weights` does.
    """
    source = source.local(progress)
    blocks: dict[str, list[LinearContents]] = {}
    for weight in stored_weights(source, progress):
        blocks.setdefault(weight.block, []).append(_count(weight))
    linears = [linear for of_block in blocks.values() for linear in of_block]
    return Contents(
        model=source.base,
        revision=source.revision,
        file_bytes=sum(path.stat().st_size for path in weight_paths(source)),
        blocks=[BlockContents(name=name, **_totals(of_block)) for name, of_block in blocks.items()],
        linears=linears,
        **_totals(linears),
    )


def _count(weight: StoredWeight) -> LinearContents:
    zeros = int(weight.zero_OI.sum())
    return LinearContents(
        name=weight.name,
        shape=list(weight.zero_OI.shape),
        zeros=zeros,
        sparsity=zeros / weight.zero_OI.numel(),
        bytes=sum(weight.parts.values()),
        parts=weight.parts,
    )


def _totals(linears: list[LinearContents]) -> dict[str, Any]:
    weights, zeros = sum(math.prod(part.shape) for part in linears), sum(part.zeros for part in linears)
    parts: Counter[str] = Counter()
    for linear in linears:
        parts.update(linear.parts)
    size = parts.total()
    return {
        "weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights,
        "bytes": size,
        "parts": dict(parts),
        "bits_per_weight": 8 * size / weights,
    }
