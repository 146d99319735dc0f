"""The weight files of a checkpoint: only safetensors, checked and read one tensor at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from besa.counting.precision import widest
from besa.errors import BesaError

STEM = "model"  # beginning of the names of weight files
SPARSE_STEM = "bitmask"  # the same for packed checkpoints, which transformers must not load with random weights
WIDTHS_STEM = "widths"  # the same for checkpoints whose blocks have widths of their own
STEMS = STEM, SPARSE_STEM, WIDTHS_STEM
NAMES = re.compile(rf"({'|'.join(STEMS)})(-\d+-of-\d+)?\.safetensors(\.index\.json)?")  # of files that besa writes
PACKED = "besa"  # the quant_method in their config.json, by which transformers and vLLM find what loads them
WIDTHS = "besa_widths"  # the same for widths
INDEX = ".safetensors.index.json"  # end of the name of an index
# Formats of weights, by their safetensors names.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightFiles:
    """The tensors of a folder by name. Only headers are read until a tensor is requested.

    The weight files are those that transformers would load: ``model.safetensors``, else the shards that
    ``model.safetensors.index.json`` names, with all their tensors. Other files (other formats, adapters, old shards)
    are ignored.

    Args:
        folder: of a Hugging Face model.

    Raises:
        BesaError: there is no safetensors file, a file is damaged or missing, or an index names files elsewhere.
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
        """Formats of all tensors by name, from the headers, with their safetensors names."""
        formats: dict[str, str] = {}
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                formats |= {
                    name: file.get_slice(name).get_dtype() for name, holder in self._holders.items() if holder == path
                }
        return formats

    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point tensor; float32 if there is none."""
        formats = self.dtypes()
        return next((FLOATS[formats[name]] for name in self._holders if formats[name] in FLOATS), torch.float32)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read tensors one at a time. They are copied from their files, which are then closed.

        Raises:
            BesaError: a tensor cannot be read, or holds NaN or infinity.
        """
        for path, path_names in self._by_path(names):
            for name in path_names:
                with safe_open(path, framework="pt") as file:  # opened for each, because a mapped file counts as memory
                    tensor = _tensor(file, name, path).clone()
                if not is_finite(tensor):
                    raise self._damaged(name)
                yield name, tensor

    def read_to(self, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        """Read tensors to a device, straight from their files; they are checked there, and the host waits once.

        Raises:
            BesaError: as `read`.
        """
        if device.type == "cpu":
            return dict(self.read(names))
        tensors = {name: _for(device, tensor).to(device) for name, tensor in self.mapped(names)}
        if (name := not_finite(tensors)) is not None:
            raise self._damaged(name)
        return tensors

    def _damaged(self, name: str) -> BesaError:
        return BesaError(
            f"The tensor {name} of {self._holders[name]} holds NaN or infinity: the checkpoint is damaged."
        )

    def mapped(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors that stay in their files: the system reads pages when they are used, and may drop them again.

        Raises:
            BesaError: a tensor cannot be read.
        """
        for path, path_names in self._by_path(names):
            with safe_open(path, framework="pt") as file:
                for name in path_names:
                    yield name, _tensor(file, name, path)

    def _by_path(self, names: Iterable[str]) -> Iterable[tuple[Path, list[str]]]:
        by_path: dict[Path, list[str]] = {}
        for name in names:
            by_path.setdefault(self._holders[name], []).append(name)
        return by_path.items()

    def prefetch(self, names: Iterable[str]) -> None:
        """Ask the system to read these tensors into its cache in the background, if it can."""
        if not hasattr(os, "posix_fadvise"):
            return
        expected = set(names)
        for path in {self._holders[name] for name in expected}:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                for name in expected & header.keys():
                    begin, end = header[name]["data_offsets"]
                    os.posix_fadvise(file.fileno(), 8 + length + begin, end - begin, os.POSIX_FADV_WILLNEED)


def _tensor(file: Any, name: str, path: Path) -> Tensor:
    """A tensor of an open file; its memory stays in the file."""
    try:
        tensor: Tensor = file.get_tensor(name)
    except ValueError as error:  # torch raises it if Ctrl-C comes while it opens the storage
        raise KeyboardInterrupt from error
    except (SafetensorError, OSError) as error:
        raise BesaError(f"The tensor {name} of {path} cannot be read: {error}.") from None
    return tensor


def _for(device: torch.device, tensor: Tensor) -> Tensor:
    """The tensor in a dtype that the device has."""
    return tensor.to(widest(device)) if tensor.dtype == torch.float64 else tensor


def _chosen(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a folder, by name."""
    for stem in STEMS:
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
    """The file of each tensor of a sharded checkpoint, by name.

    As in transformers, an index says which files to load, not where a tensor is. The last of several tensors of the
    same name counts.
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
            return sorted(file.keys())  # independent of the hash seed
    except (SafetensorError, OSError, ValueError) as error:
        raise BesaError(f"{path} cannot be read as safetensors: {' '.join(str(error).split())}.") from None


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    return not_finite({"": tensor}) is None


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, None if none does; a device is waited for once.

    Checking the extremes of a tensor is forty times as fast as checking all of it.
    """
    floats = {name: each for name, each in tensors.items() if each.dtype in FLOATS.values() and each.numel()}
    if not floats:
        return None
    extremes = torch.stack([extreme for tensor in floats.values() for extreme in tensor.aminmax()])
    finite: list[bool] = extremes.view(-1, 2).isfinite().all(dim=1).tolist()
    return next((name for name, one in zip(floats, finite, strict=True) if not one), None)
