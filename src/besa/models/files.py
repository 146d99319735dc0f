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
SINGLE = f"{STEM}.safetensors"


class WeightFiles:
    """The tensors of a folder by name; their headers are read, and nothing else until asked for.

    Args:
        folder: of a Hugging Face model.

    Raises:
        BesaError: no safetensors, or a damaged or missing file, or an index that points elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        indices = [folder / f"{stem}.safetensors.index.json" for stem in (STEM, SPARSE_STEM)]
        index = next((path for path in indices if path.is_file()), None)
        self._holders = _indexed(index) if index else _single(folder)
        self.paths = sorted(set(self._holders.values()))
        for path in self.paths:
            missing = {name for name, holder in self._holders.items() if holder == path}.difference(_names(path))
            if missing and index:
                raise BesaError(
                    f"{path} lacks the tensor {min(missing)} that {index.name} promises: the file is damaged."
                )

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

    def dtype(self) -> torch.dtype:
        """Of the first tensor of floating-point numbers; float32 where there is none."""
        for _, tensor in self.read(self.names):
            if tensor.is_floating_point():
                return tensor.dtype
        return torch.float32

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

    def expect(self, names: Iterable[str]) -> None:
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


def _single(folder: Path) -> dict[str, Path]:
    """Tensors of a folder without an index, by the file that holds them."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise BesaError(
            f"{folder} has no .safetensors weights: convert the model first (load it where you trust it and "
            "call save_pretrained), as besa reads no pickled weights."
        )
    if (folder / SINGLE) in paths:
        paths = [folder / SINGLE]
    return {name: path for path in paths for name in _names(path)}


def _indexed(index: Path) -> dict[str, Path]:
    """Tensors of a sharded checkpoint by the file that holds them, as the index says."""
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        holders = {str(name): str(file) for name, file in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BesaError(f"{index} is no index of a checkpoint: the file is damaged.") from None
    for file in holders.values():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise BesaError(f"{index} names the file {file!r}: only .safetensors in its own folder are read.")
        if not (index.parent / file).is_file():
            raise BesaError(f"{index.parent} lacks {file}, which {index.name} names: the checkpoint is incomplete.")
    if not holders:
        raise BesaError(f"{index} names no tensors: the file is damaged.")
    return {name: index.parent / file for name, file in holders.items()}


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return sorted(file.keys())  # an order that no hash seed changes
    except (SafetensorError, OSError, ValueError) as error:
        raise BesaError(f"{path} cannot be read as safetensors: {' '.join(str(error).split())}.") from None


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; its extremes tell, and are found forty times as fast."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def check_regular(folder: Path) -> None:
    """Refuse a folder with a pipe, a socket or a device in it, whose reader would wait for ever.

    Raises:
        BesaError: there is one, or a link to one.
    """
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise BesaError(f"{path} is no regular file: a checkpoint has no pipes, sockets or devices.")
