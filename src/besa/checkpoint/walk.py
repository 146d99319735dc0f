"""The prunable weights of a checkpoint as stored in its files, one after another: their zeros and their bytes.

Shape suffixes: O rows (output channels), I columns (input channels).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from besa.checkpoint.checking import check_complete, check_packed
from besa.models.finding import find_blocks
from besa.models.layout import renaming
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
        progress: called with (blocks done, number of blocks, name of the block).

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
    """All prunable weights, block after block, with the bytes of those that are not stored as bitmasks."""
    config = read_config(source)
    if files and is_quantized(config):
        empty = check_complete(source, files, config)
        yield from _coded(files, empty, codes.bits_of(quantization_of(config), source.name), progress)
        return
    decoder: Decoder = DecoderInMemory(load_model(source)) if source.gguf else DecoderOnDisk(source)
    for done, block in enumerate(decoder.blocks, start=1):
        with decoder.opened(block, torch.device("cpu")):
            for name in block.prunables:
                yield _dense(block.name, name, block.weight(name))
        progress(done, len(decoder.blocks), block.name)


def _coded(files: WeightFiles, model: PreTrainedModel, bits: int, progress: Progress) -> Iterator[StoredWeight]:
    """The weights of a checkpoint of codes: those that are codes, and those that were left out of quantisation.

    Their order is the model's, as for dense weights, and not that of the files, which are sorted by name.

    Args:
        files: of the checkpoint.
        model: on the meta device.
        bits: of a code.
        progress: as of `stored_weights`.
    """
    blocks, renamed = find_blocks(model), renaming(model, get_model_conversion_mapping(model))
    of_blocks: dict[str, list[tuple[int, str]]] = {block.name: [] for block in blocks}
    places = {block.name: _places(block.prunables) for block in blocks}
    present = set(files.names)
    for stored in files.names:
        linear, _, last = stored.rpartition(".")
        name, merged = renamed(f"{linear}.weight") if last in (codes.WEIGHT, "weight") else ("", False)
        path = name.removesuffix(".weight")
        for block in blocks:
            if name.startswith(f"{block.name}.") and (merged or path in block.prunables):
                of_blocks[block.name].append((places[block.name].get(path, 0), stored))
    for done, (block_name, names) in enumerate(of_blocks.items(), start=1):
        for _, stored in sorted(names, key=itemgetter(0)):
            name, _, last = stored.rpartition(".")
            if last == codes.WEIGHT:
                keys = [key for key in codes.KEYS if f"{name}.{key}" in present]
                tensors = {key.rpartition(".")[2]: t for key, t in files.read([f"{name}.{key}" for key in keys])}
                yield StoredWeight(block_name, name, codes.is_zero(tensors, bits), codes.bytes_of(tensors))
            else:
                ((_, w_OI),) = files.read([stored])
                if w_OI.dim() == 2:  # left out of quantisation
                    yield _dense(block_name, name, w_OI)
        progress(done, len(blocks), block_name)


def _places(names: Iterable[str]) -> dict[str, int]:
    """The places of matrices in their block; a stack of experts, from one tensor an expert, has that of its first."""
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        places.setdefault(name, place)
        places.setdefault(name.rpartition(".")[0], place)
    return places


def _dense(block: str, name: str, w_OI: Tensor) -> StoredWeight:
    return StoredWeight(block, name, w_OI == 0, {"values": w_OI.numel() * w_OI.itemsize})
