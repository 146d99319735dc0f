"""What is in a checkpoint, counted in its files."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from besa.errors import BesaError
from besa.models.files import WeightFiles
from besa.models.loading import Source, load_model
from besa.models.streaming import Decoder, DecoderInMemory, DecoderOnDisk
from besa.progress import Progress, silent


class LinearContents(BaseModel):
    """One prunable weight as it is stored."""

    name: str
    shape: list[int]
    zeros: int
    sparsity: float
    bytes: int


class BlockContents(BaseModel):
    """One decoder block: its prunable weights together."""

    name: str
    weights: int
    zeros: int
    sparsity: float
    bytes: int


class Contents(BaseModel):
    """A checkpoint: totals over the prunable weights, each block, each linear."""

    model: str
    weights: int
    zeros: int
    sparsity: float
    bytes: int
    file_bytes: int
    blocks: list[BlockContents]
    linears: list[LinearContents]


def inspect(source: Source, trust_remote_code: bool = False, progress: Progress = silent) -> Contents:
    """Count zeros and bytes of every prunable weight of a local checkpoint.

    One block is in memory at a time; a .gguf file is dequantised whole, and its bytes are those of
    the dequantised weights.

    Raises:
        BesaError: the model is not local, or a weight is missing or cannot be read.
    """
    if source.folder is None:
        raise BesaError(f"{source.name} is not a local model: download it first, and give its folder.")
    if source.gguf:
        decoder: Decoder = DecoderInMemory(load_model(source))
        paths = [source.folder / source.gguf]
    else:
        decoder = DecoderOnDisk(source, trust_remote_code=trust_remote_code)
        paths = WeightFiles(source.folder).paths
    linears: list[LinearContents] = []
    summaries: list[BlockContents] = []
    for block in decoder.blocks:
        with decoder.opened(block, torch.device("cpu")):
            parts = [_count(name, block.weight(name)) for name in block.prunables]
        linears += parts
        summaries.append(BlockContents(name=block.name, **_totals(parts)))
        progress(len(summaries), len(decoder.blocks), block.name)
    size = sum(path.stat().st_size for path in paths)
    return Contents(model=source.name, file_bytes=size, blocks=summaries, linears=linears, **_totals(linears))


def _count(name: str, w_OI: Tensor) -> LinearContents:
    zeros = int((w_OI == 0).sum())
    return LinearContents(
        name=name,
        shape=list(w_OI.shape),
        zeros=zeros,
        sparsity=zeros / w_OI.numel(),
        bytes=w_OI.numel() * w_OI.itemsize,
    )


def _totals(parts: list[LinearContents]) -> dict[str, Any]:
    weights, zeros = sum(math.prod(part.shape) for part in parts), sum(part.zeros for part in parts)
    return {"weights": weights, "zeros": zeros, "sparsity": zeros / weights, "bytes": sum(part.bytes for part in parts)}
