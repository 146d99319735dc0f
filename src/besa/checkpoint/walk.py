"""The prunable weights of a checkpoint as stored in its files, one after another: their zeros and their bytes.

Shape suffixes: O rows (output channels), I columns (input channels).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from besa.checkpoint.checking import check_complete, check_packed
from besa.models.loading import is_quantized, load_model, quantization_of, read_config
from besa.models.source import Source
from besa.models.streaming import Decoder, DecoderInMemory, DecoderOnDisk
from besa.progress import Progress
from besa.storage.formats import codes
from besa.storage.formats.container import Container, open_files
from besa.storage.weights import WeightFiles


@dataclass(frozen=True)
class StoredWeight:
    """One prunable weight (O, I).

    Attributes:
        block: name of its decoder block.
        name: module path of its linear in the model.
        zero_OI: boolean, true at zero weights.
        parts: number of bytes, by purpose.
    """

    block: str
    name: str
    zero_OI: Tensor
    parts: dict[str, int]


def stored_weights(source: Source, progress: Progress) -> Iterator[StoredWeight]:
    """All prunable weights of a checkpoint, block after block.

    One block is in memory at a time. A .gguf file is dequantised whole, and the bytes of the dequantised weights are
    counted.

    Args:
        source: dense, pruned or packed, and local.
        progress: told (blocks done, blocks, name of the block).

    Raises:
        BesaError: a weight is missing or cannot be read.
    """
    assert source.folder is not None
    files = None if source.gguf else open_files(source.folder)
    if files:
        check_packed(files)
    for weight in _weights(source, files, progress):
        parts = files.parts(weight.name) if isinstance(files, Container) else {}
        yield replace(weight, parts=parts) if parts else weight


def _weights(source: Source, files: WeightFiles | None, progress: Progress) -> Iterator[StoredWeight]:
    """The same, with the bytes of weights that are not stored as bitmasks."""
    config = read_config(source)
    if files and is_quantized(config):
        check_complete(source, files, config)
        yield from _coded(files, source.name, quantization_of(config), progress)
        return
    decoder: Decoder = DecoderInMemory(load_model(source)) if source.gguf else DecoderOnDisk(source)
    for done, block in enumerate(decoder.blocks, start=1):
        with decoder.opened(block, torch.device("cpu")):
            for name in block.prunables:
                yield _dense(block.name, name, block.weight(name))
        progress(done, len(decoder.blocks), block.name)


def _coded(files: WeightFiles, source: str, config: dict[str, Any], progress: Progress) -> Iterator[StoredWeight]:
    """The weights of a checkpoint of codes; the first number in a name is that of the block."""
    bits = codes.bits_of(config, source)
    owners: dict[str, list[str]] = {}
    for name in files.names:
        match = re.match(r"(.*?\.\d+)\.", name)
        if match and name.endswith((f".{codes.WEIGHT}", ".weight")):
            owners.setdefault(match[1], []).append(name)
    for done, block in enumerate(sorted(owners, key=lambda name: int(name.rpartition(".")[2])), start=1):
        for stored in owners[block]:
            name, _, last = stored.rpartition(".")
            if last == codes.WEIGHT:
                keys = [key for key in codes.KEYS if f"{name}.{key}" in files.names]
                tensors = {key.rpartition(".")[2]: t for key, t in files.read([f"{name}.{key}" for key in keys])}
                yield StoredWeight(block, name, codes.is_zero(tensors, bits), codes.bytes_of(tensors))
            else:
                ((_, w_OI),) = files.read([stored])
                if w_OI.dim() == 2:  # left out of quantisation
                    yield _dense(block, name, w_OI)
        progress(done, len(owners), block)


def _dense(block: str, name: str, w_OI: Tensor) -> StoredWeight:
    return StoredWeight(block, name, w_OI == 0, {"values": w_OI.numel() * w_OI.itemsize})
