"""Writing tensors as safetensors: files of them, and one file out of several."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from besa.errors import BesaError
from besa.storage.writing import replacing

COPY = 1 << 24  # bytes copied at a time
METADATA = {"format": "pt"}  # transformers requires it in a safetensors file
# The format's name of each dtype, in the order in which safetensors writes them: the widest first, so that all numbers
# are aligned. https://github.com/huggingface/safetensors
NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float4_e2m1fn_x2: "F4",
    torch.bool: "BOOL",
}
PLACES = {dtype: place for place, dtype in enumerate(NAMES)}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write tensors of any device and layout as safetensors, with optional further metadata.

    The bytes are those of safetensors' own `save_file`, which makes another file and renames it, so that the lock on
    this one would be lost. One tensor at a time is copied, where its device or layout needs it.

    Raises:
        BesaError: the file cannot be written, or the format has no such numbers.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise BesaError(f"{path} cannot be written: safetensors files have no {tensor.dtype}, as {name} is.")
    ordered = sorted(tensors.items(), key=lambda item: (PLACES[item[1].dtype], item[0]))
    header: dict[str, Any] = {"__metadata__": METADATA | dict(about or {})}
    begin = 0
    for name, tensor in ordered:
        shape = list(tensor.shape)
        if tensor.dtype == torch.float4_e2m1fn_x2:  # torch counts pairs, which are a byte
            shape[-1] *= 2
        end = begin + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(_head(header))
        for _, tensor in ordered:
            file.write(bytes_of(tensor.detach().cpu()).numpy().data)


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, uint8, in the order of its numbers; a copy where it is not contiguous.

    Torch calls a tensor of one number contiguous whatever its stride, and does not view it as bytes for that stride.
    """
    tensor = tensor.contiguous()
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


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
    with replacing(path) as partial, partial.open("wb") as joined:
        joined.write(_head(header))
        for part, start in zip(parts, starts, strict=True):
            with part.open("rb") as file:
                file.seek(start)
                shutil.copyfileobj(file, joined, COPY)


def _head(header: Mapping[str, Any]) -> bytes:
    """What comes before the tensors: the size of the header in eight bytes, and the header."""
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors must begin at multiples of eight bytes
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file: entries of its tensors by name, and the byte at which the data begins."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    return entries, 8 + size
