"""A checkpoint whose sparse linears are stored as bitmasks: names, header, and how it is read.

docs/formats.md specifies it. A *linear* is here what a weight's name is without its last part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from besa.errors import BesaError
from besa.storage.formats import packed
from besa.storage.formats.bitmask import Bitmask
from besa.storage.weights import WeightFiles

FORMAT, VERSION = "bitmask", 1
PURPOSES = {
    (MASK := "weight_mask"): "masks",
    (VALUES := "weight_values"): "values",
    (OFFSETS := "weight_offsets"): "offsets",
    (SHAPE := "weight_shape"): "shapes",
    (SCALE := "weight_scale"): "scales",
    (ZERO := "weight_zero_point"): "zero points",
}
HEADER = {"format": FORMAT, "version": VERSION}
ABOUT = {"besa": json.dumps(HEADER)}  # metadata of the weight files
DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")  # what families call the number of their blocks
DAMAGED = "the packed checkpoint is damaged"


def header(folder: Path) -> dict[str, Any] | None:
    """What config.json says under `besa` of a packed checkpoint; None for any other.

    Raises:
        BesaError: it is packed in a format, or in a version of ours, that this besa does not know, or is damaged.
    """
    config = _config(folder)
    if not isinstance(config, dict) or "besa" not in config:
        return None
    found = config["besa"]
    if not isinstance(found, dict):
        raise BesaError(f'{folder / "config.json"} is damaged: under "besa" it holds no settings.')
    if "format" not in found:
        return None
    if found["format"] != FORMAT or found.get("version") != VERSION:
        raise BesaError(
            f"{folder} is packed in the format {found['format']!r}, version {found.get('version')!r}, and this besa "
            f"reads {FORMAT!r}, version {VERSION}: use the besa that packed it, or unpack it with that and pack it "
            "with this."
        )
    return found


def tensors_of(weight: Bitmask) -> dict[str, Tensor]:
    """The tensors of one linear by the last part of their names."""
    shape = torch.tensor(weight.shape)
    found = {MASK: weight.masks_BCR, VALUES: weight.values, OFFSETS: weight.offsets, SHAPE: shape}
    if weight.scales_OG is not None:
        found[SCALE] = weight.scales_OG
    if weight.zeros_OG is not None:
        found[ZERO] = weight.zeros_OG
    return found


class Container(WeightFiles):
    """A packed checkpoint, read as the files it was packed from; and as it is, by who runs it.

    Attributes:
        bits: of a code, where weights are stored as codes.
        sparse: names of the tensors in the files by linear stored as bitmask.
        dense: names of all other tensors.

    Args:
        folder: for which `header` finds something.

    Raises:
        BesaError: its version is not known, or files are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        found = header(folder)
        assert found is not None
        codes = found.get("quantization_config")
        self.bits = packed.bits_of(codes, str(folder)) if codes else None
        stored = set(self._holders)
        own = (MASK, VALUES, OFFSETS)
        linears = sorted({linear for linear, _, key in (name.rpartition(".") for name in stored) if key in own})
        self.sparse = {
            linear: [name for key in PURPOSES if (name := f"{linear}.{key}") in stored] for linear in linears
        }
        for linear, names in self.sparse.items():
            missing = [key for key in (MASK, VALUES, OFFSETS, SHAPE) if f"{linear}.{key}" not in names]
            if missing:
                raise BesaError(f"{folder} lacks {linear}.{missing[0]}: {DAMAGED}.")
        self._originals = {name: linear for linear in linears for name in self._original(linear)}
        inside = {name for names in self.sparse.values() for name in names}
        self.dense = [name for name in self._holders if name not in inside]

    def _original(self, linear: str) -> list[str]:
        """Names that the tensors of a linear had before it was packed."""
        if f"{linear}.{SCALE}" not in self._holders:
            return [f"{linear}.weight"]
        zeros = f"{linear}.{ZERO}" in self._holders
        return [f"{linear}.{key}" for key in packed.KEYS if key != packed.ZERO or zeros]

    @property
    def names(self) -> list[str]:
        """Names of all tensors before packing."""
        return sorted([*self.dense, *self._originals])

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all tensors before packing."""
        dense = set(self.dense)
        yield from ((name, shape) for name, shape in super().shapes() if name in dense)
        for linear in self.sparse:
            if f"{linear}.weight" in self._originals:
                ((_, shape),) = super().read([f"{linear}.{SHAPE}"])
                yield f"{linear}.weight", tuple(shape.tolist())
            else:
                yield from ((name, tuple(tensor.shape)) for name, tensor in self.read(self._original(linear)))

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read tensors as they were before packing, one linear at a time.

        Raises:
            BesaError: a tensor cannot be read, or is not what `check` lets pass.
        """
        linears: dict[str, None] = {}
        for name in names:
            if name in self._originals:
                linears[self._originals[name]] = None
            else:
                yield from super().read([name])
        for linear in linears:
            weight = self._taken(linear, super().read(self.sparse[linear]))
            if weight.scales_OG is None:
                yield f"{linear}.weight", weight.unpack()
            else:
                own = packed.tensors_of(weight.unpack_codes())
                yield from ((f"{linear}.{key}", tensor) for key, tensor in own.items())

    def prefetch(self, names: Iterable[str]) -> None:
        """See `WeightFiles`."""
        linears = {self._originals[name] for name in names if name in self._originals}
        own = [name for linear in linears for name in self.sparse[linear]]
        super().prefetch([*(name for name in names if name not in self._originals), *own])

    def weights(self) -> Iterator[tuple[str, Bitmask]]:
        """Every sparse weight by its linear; it stays in its file.

        Raises:
            BesaError: one cannot be read, or has no shape.
        """
        stored = dict(super().mapped(name for names in self.sparse.values() for name in names))
        for linear, names in self.sparse.items():
            yield linear, self._taken(linear, ((name, stored[name]) for name in names))

    def parts(self, linear: str) -> dict[str, int]:
        """What the tensors of a linear take, in bytes, by what they are for; empty where it is no bitmask.

        Args:
            linear: as the files call it, or the model, which may put one word more before it.
        """
        linear = linear if linear in self.sparse else linear.partition(".")[2]
        stored = super().mapped(self.sparse.get(linear, ()))
        return {PURPOSES[name.rpartition(".")[2]]: tensor.nbytes for name, tensor in stored}

    def _taken(self, linear: str, tensors: Iterable[tuple[str, Tensor]]) -> Bitmask:
        own = {name.rpartition(".")[2]: tensor for name, tensor in tensors}
        if own[SHAPE].shape != (2,) or own[SHAPE].dtype != torch.int64:
            raise BesaError(f"{linear}.{SHAPE} of {self.folder} holds no shape: {DAMAGED}.")
        rows, columns = own[SHAPE].tolist()
        bits = self.bits if SCALE in own else None
        return Bitmask((rows, columns), own[MASK], own[VALUES], own[OFFSETS], own.get(SCALE), own.get(ZERO), bits)


def open_files(folder: Path) -> WeightFiles:
    """The weight files of a checkpoint under the names and as the tensors they have when not packed as bitmasks.

    Raises:
        BesaError: as `WeightFiles` and `Container` do, or config.json says more blocks than there are tensors.
    """
    files = WeightFiles(folder) if header(folder) is None else Container(folder)
    depth, tensors = _depth(_config(folder)), len(files.names)
    if depth > tensors:  # found out before a model of so many is made
        raise BesaError(
            f"The config.json of {folder} says {depth:,.0f} blocks, its files hold {tensors:,} tensors: it is damaged, "
            "or belongs to another checkpoint."
        )
    return files


def bits_in(files: WeightFiles) -> int | None:
    """Bits of a code, of a checkpoint whose weights are codes; None of any other.

    Raises:
        BesaError: they are codes of another format, or of no number of bits.
    """
    if isinstance(files, Container):
        return files.bits
    config = _config(files.folder)
    codes = config.get("quantization_config") if isinstance(config, dict) else None
    return packed.bits_of(codes, str(files.folder)) if codes else None


class AsDense(WeightFiles):
    """The headers of a checkpoint, packed or not, as they are when its weights are dense: no codes and no bitmasks.

    Args:
        files: of the checkpoint, checked.
    """

    def __init__(self, files: WeightFiles) -> None:
        super().__init__(files.folder)
        shapes, packed_parts = dict(super().shapes()), {*PURPOSES, *packed.KEYS}
        self._shapes = {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] not in packed_parts}
        for name, tensor in self.mapped([name for name in shapes if name.endswith(f".{SHAPE}")]):
            self._shapes[f"{name.removesuffix(f'.{SHAPE}')}.weight"] = tuple(tensor.tolist())

    @property
    def names(self) -> list[str]:
        """Names of all weights."""
        return list(self._shapes)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all weights."""
        yield from self._shapes.items()


def _config(folder: Path) -> Any:
    """What stands in config.json; None where that cannot be read, which whoever needs it will say."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _depth(config: Any) -> float:
    """The largest number of blocks that a configuration names, or one of those within it."""
    if not isinstance(config, dict):
        return 0
    own = [config[key] for key in DEPTHS if isinstance(config.get(key), int | float)]
    return max([*own, *(_depth(part) for part in config.values())], default=0)
