"""What is in a checkpoint, counted in its files."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from besa.checkpoint.formats import packed
from besa.checkpoint.formats.container import Container, open_files
from besa.errors import BesaError
from besa.models.files import WeightFiles
from besa.models.loading import Source, is_quantized, load_model, quantization_of, read_config
from besa.models.streaming import Decoder, DecoderInMemory, DecoderOnDisk
from besa.progress import Progress, silent


class LinearContents(BaseModel):
    """One prunable weight as it is stored; `parts` says of what its bytes are."""

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
    """A checkpoint: totals over the prunable weights, each block, each linear."""

    model: str
    weights: int
    zeros: int
    sparsity: float
    bytes: int
    parts: dict[str, int]
    bits_per_weight: float
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
    files = None if source.gguf else open_files(source.folder)
    paths = files.paths if files else [source.folder / str(source.gguf)]
    linears: list[LinearContents] = []
    summaries: list[BlockContents] = []
    for name, parts in _blocks(source, trust_remote_code, progress):
        parts = [_as_stored(part, files) for part in parts]
        linears += parts
        summaries.append(BlockContents(name=name, **_totals(parts)))
    size = sum(path.stat().st_size for path in paths)
    return Contents(model=source.name, file_bytes=size, blocks=summaries, linears=linears, **_totals(linears))


def _blocks(source: Source, trust_remote_code: bool, progress: Progress) -> Iterator[tuple[str, list[LinearContents]]]:
    """Each block's name and prunable weights, one block at a time."""
    assert source.folder is not None
    config = read_config(source, trust_remote_code)
    if not source.gguf and is_quantized(config):
        yield from _packed_blocks(open_files(source.folder), source.name, quantization_of(config))
        return
    if source.gguf:
        decoder: Decoder = DecoderInMemory(load_model(source))
    else:
        decoder = DecoderOnDisk(source, trust_remote_code=trust_remote_code)
    for done, block in enumerate(decoder.blocks, start=1):
        with decoder.opened(block, torch.device("cpu")):
            yield block.name, [_count(name, block.weight(name)) for name in block.prunables]
        progress(done, len(decoder.blocks), block.name)


def _packed_blocks(
    files: WeightFiles, source: str, config: dict[str, Any]
) -> Iterator[tuple[str, list[LinearContents]]]:
    """The same of a checkpoint of packed codes; its blocks are told by the first number in a name."""
    bits = packed.bits_of(config, source)
    owners: dict[str, list[str]] = {}
    for name in files.names:
        match = re.match(r"(.*?\.\d+)\.", name)
        if match and name.endswith((f".{packed.WEIGHT}", ".weight")):
            owners.setdefault(match[1], []).append(name)
    for block in sorted(owners, key=lambda name: int(name.rpartition(".")[2])):
        parts = []
        for stored in owners[block]:
            name, _, last = stored.rpartition(".")
            if last == packed.WEIGHT:
                keys = [key for key in packed.KEYS if f"{name}.{key}" in files.names]
                own = {key.rpartition(".")[2]: t for key, t in files.read([f"{name}.{key}" for key in keys])}
                parts.append(_contents(name, packed.is_zero(own, bits), packed.bytes_of(own)))
            else:
                ((_, w_OI),) = files.read([stored])
                if w_OI.dim() == 2:  # left out of quantisation
                    parts.append(_count(name, w_OI))
        yield block, parts


def _count(name: str, w_OI: Tensor) -> LinearContents:
    return _contents(name, w_OI == 0, {"values": w_OI.numel() * w_OI.itemsize})


def _contents(name: str, zero_OI: Tensor, parts: dict[str, int]) -> LinearContents:
    zeros = int(zero_OI.sum())
    return LinearContents(
        name=name,
        shape=list(zero_OI.shape),
        zeros=zeros,
        sparsity=zeros / zero_OI.numel(),
        bytes=sum(parts.values()),
        parts=parts,
    )


def _as_stored(linear: LinearContents, files: WeightFiles | None) -> LinearContents:
    """The same with the bytes it takes as bitmask, if it is one."""
    parts = files.parts(linear.name) if isinstance(files, Container) else {}
    return linear.model_copy(update={"bytes": sum(parts.values()), "parts": parts}) if parts else linear


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
