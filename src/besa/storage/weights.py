"""The weight files of a checkpoint: safetensors only, checked, read one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from besa.errors import BesaError

STEM = "model"  # what the names of weight files begin with
SPARSE_STEM = "bitmask"  # the same of packed checkpoints: another one, lest transformers fill a model at random
INDEX = ".safetensors.index.json"  # what the name of an index ends with
# What a weight may be stored as, by the name that safetensors has for it.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightFiles:
    """The tensors of a folder by name; their headers are read, and nothing else until asked for.

    Of several weight files, those count that transformers would load: ``model.safetensors``, else the shards that
    ``model.safetensors.index.json`` names, with all that is in them. Files beside them (other formats, adapters, stale
    shards) do not count.

    Args:
        folder: of a Hugging Face model.

    Raises:
        BesaError: no safetensors, or a damaged or missing file, or an index that points elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._holders = _chosen(folder)
        self.paths = sorted(set(self._holders.values()))

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._holders)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all tensors, from the headers."""
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                for name, holder in self._holders.items():
                    if holder == path:
                        yield name, tuple(file.get_slice(name).get_shape())

    def dtypes(self) -> dict[str, str]:
        """Formats of all tensors in the files by name, from the headers, as safetensors calls them."""
        found: dict[str, str] = {}
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                found |= {
                    name: file.get_slice(name).get_dtype() for name, holder in self._holders.items() if holder == path
                }
        return found

    def dtype(self) -> torch.dtype:
        """Of the first tensor of floating-point numbers; float32 where there is none."""
        found = self.dtypes()
        return next((FLOATS[found[name]] for name in self._holders if found[name] in FLOATS), torch.float32)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read tensors, one at a time and copied out of their files, which are closed afterwards.

        Raises:
            BesaError: a tensor cannot be read, or has a NaN or an infinite value.
        """
        for path, own in self._by_path(names):
            for name in own:
                with safe_open(path, framework="pt") as file:  # anew each time: a mapped file counts as memory
                    tensor = _tensor(file, name, path).clone()
                if not is_finite(tensor):
                    raise BesaError(f"The tensor {name} of {path} holds NaN or infinity: the checkpoint is damaged.")
                yield name, tensor

    def mapped(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors that stay in their files: the system reads what is used of them, and may forget it again.

        Raises:
            BesaError: a tensor cannot be read.
        """
        for path, own in self._by_path(names):
            with safe_open(path, framework="pt") as file:
                for name in own:
                    yield name, _tensor(file, name, path)

    def _by_path(self, names: Iterable[str]) -> Iterable[tuple[Path, list[str]]]:
        found: dict[Path, list[str]] = {}
        for name in names:
            found.setdefault(self._holders[name], []).append(name)
        return found.items()

    def prefetch(self, names: Iterable[str]) -> None:
        """Have the system read these tensors in the background, into its own memory, where it knows how to."""
        if not hasattr(os, "posix_fadvise"):
            return
        wanted = set(names)
        for path in {self._holders[name] for name in wanted}:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                for name in wanted & header.keys():
                    begin, end = header[name]["data_offsets"]
                    os.posix_fadvise(file.fileno(), 8 + length + begin, end - begin, os.POSIX_FADV_WILLNEED)


def _tensor(file: Any, name: str, path: Path) -> Tensor:
    """A tensor of an open file, in which it stays."""
    try:
        tensor: Tensor = file.get_tensor(name)
    except ValueError as error:  # torch, interrupted while it looks at the storage, says so
        raise KeyboardInterrupt from error
    except (SafetensorError, OSError) as error:
        raise BesaError(f"The tensor {name} of {path} cannot be read: {error}.") from None
    return tensor


def _chosen(folder: Path) -> dict[str, Path]:
    """The tensors of a folder by the file that holds them."""
    for stem in (STEM, SPARSE_STEM):
        whole, index = folder / f"{stem}.safetensors", folder / f"{stem}{INDEX}"
        if whole.is_file():
            return dict.fromkeys(_names(whole), whole)
        if index.is_file():
            return _indexed(index)
    raise BesaError(
        f"{folder} has no .safetensors weights that transformers would load ({STEM}.safetensors, or {STEM}{INDEX} with "
        "its shards): convert the model first (load it where you trust it and call save_pretrained), as besa reads no "
        "pickled weights."
    )


def _indexed(index: Path) -> dict[str, Path]:
    """The tensors of a sharded checkpoint by the file that holds them.

    As for transformers, an index says which files count, and not where a tensor is: of two alike, the last one counts.
    """
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        promised = {str(name): str(file) for name, file in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BesaError(f"{index} is no index of a checkpoint: the file is damaged.") from None
    shards = sorted(set(promised.values()))
    for file in shards:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise BesaError(f"{index} names the file {file!r}: only .safetensors in its own folder are read.")
        if not (index.parent / file).is_file():
            raise BesaError(f"{index.parent} lacks {file}, which {index.name} names: the checkpoint is incomplete.")
    if not shards:
        raise BesaError(f"{index} names no tensors: the file is damaged.")
    holders = {name: index.parent / file for file in shards for name in _names(index.parent / file)}
    if missing := promised.keys() - holders.keys():
        name = min(missing)
        raise BesaError(
            f"{index.parent / promised[name]} lacks the tensor {name} that {index.name} promises: the file is damaged."
        )
    return holders


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return sorted(file.keys())  # an order that no hash seed changes
    except (SafetensorError, OSError, ValueError) as error:
        raise BesaError(f"{path} cannot be read as safetensors: {' '.join(str(error).split())}.") from None


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; its extremes tell, and are found forty times as fast."""
    if tensor.dtype not in FLOATS.values() or tensor.numel() == 0:
        return True
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def check_regular(folder: Path) -> None:
    """Refuse a folder with a pipe, a socket or a device in it, whose reader would wait for ever.

    Raises:
        BesaError: there is one, or a link to one.
    """
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise BesaError(f"{path} is no regular file: remove it, as besa uses no pipes, sockets or devices.")
