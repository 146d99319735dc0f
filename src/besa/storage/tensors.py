"""Writing tensors as safetensors: files of them, and one file out of several."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from besa.storage.writing import replacing

COPY = 1 << 24  # bytes copied at a time
METADATA = {"format": "pt"}  # transformers requires it in a safetensors file


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write tensors of any device and layout as safetensors, with optional further metadata.

    Raises:
        BesaError: the file cannot be written.
    """
    with replacing(path) as partial:
        mode = partial.stat().st_mode
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, METADATA | dict(about or {})
        )
        partial.chmod(mode)  # safetensors makes a new file, which its owner alone may read


def join_tensors(path: Path, parts: Sequence[Path], about: Mapping[str, str] | None = None) -> None:
    """Write the tensors of several safetensors files into one, without loading them into memory.

    Raises:
        BesaError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": METADATA | dict(about or {})}
    begin, starts = 0, []
    for part in parts:
        entries, start = read_header(part)
        for name, entry in entries.items():
            header[name] = entry | {"data_offsets": [begin + offset for offset in entry["data_offsets"]]}
        begin += part.stat().st_size - start
        starts.append(start)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors must begin at multiples of eight bytes
    with replacing(path) as partial, partial.open("wb") as joined:
        joined.write(len(text).to_bytes(8, "little") + text)
        for part, start in zip(parts, starts, strict=True):
            with part.open("rb") as file:
                file.seek(start)
                shutil.copyfileobj(file, joined, COPY)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file: entries of its tensors by name, and the byte at which the data begins."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    return entries, 8 + size
