"""What is in a checkpoint, counted in its files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from besa.errors import BesaError
from besa.models.blocks import Block, find_blocks
from besa.models.loading import Source, empty_model, load_model
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

    The safetensors files are read one tensor at a time; a .gguf file is dequantised whole, and its bytes are those of
    the dequantised weights.

    Raises:
        BesaError: the model is not local, or a weight is missing or cannot be read.
    """
    if source.folder is None:
        raise BesaError(f"{source.name} is not a local model: download it first, and give its folder.")
    if source.gguf:
        model = load_model(source)
        blocks = find_blocks(model)
        tensors = {f"{name}.weight": part.weight for block in blocks for name, part in block.linears.items()}
        return _contents(source, blocks, tensors.__getitem__, (source.folder / source.gguf).stat().st_size, progress)
    blocks = find_blocks(empty_model(source, trust_remote_code))
    files = sorted(source.folder.glob("*.safetensors"))
    return _contents(source, blocks, _reader(files), sum(path.stat().st_size for path in files), progress)


def _reader(files: list[Path]) -> Callable[[str], Tensor]:
    """A function from a tensor's name to the tensor, read from the file that holds it."""
    holders: dict[str, Any] = {}
    for path in files:
        try:
            handle = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise BesaError(f"{path} cannot be read as safetensors: {error}.") from None
        holders |= dict.fromkeys(handle.keys(), handle)

    def read(name: str) -> Tensor:
        if name not in holders:
            raise BesaError(f"{files[0].parent} lacks the weight {name}: the checkpoint is incomplete.")
        tensor: Tensor = holders[name].get_tensor(name)
        return tensor

    return read


def _contents(
    source: Source, blocks: list[Block], read: Callable[[str], Tensor], file_bytes: int, progress: Progress
) -> Contents:
    linears: list[LinearContents] = []
    summaries: list[BlockContents] = []
    for block in blocks:
        parts = [_count(name, read(f"{name}.weight")) for name in block.linears]
        linears += parts
        summaries.append(BlockContents(name=block.name, **_totals(parts)))
        progress(len(summaries), len(blocks), block.name)
    return Contents(model=source.name, file_bytes=file_bytes, blocks=summaries, linears=linears, **_totals(linears))


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
