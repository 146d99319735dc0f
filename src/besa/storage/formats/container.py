"""A checkpoint whose sparse linears are stored as bitmasks: names, header, and how it is read.

Its head and embeddings may be codes. docs/formats.md specifies all of it. Here, a *linear* is the name of a weight
without its last part.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from besa.errors import BesaError
from besa.storage.entry import besa_entry
from besa.storage.formats import codes
from besa.storage.formats.bitmask import Bitmask
from besa.storage.formats.row_codes import RowCodes
from besa.storage.weights import PACKED, SPARSE_STEM, WeightFiles

FORMAT, VERSION = "bitmask", 2
PURPOSES = {
    (MASK := "weight_mask"): "masks",
    (VALUES := "weight_values"): "values",
    (OFFSETS := "weight_offsets"): "offsets",
    (SHAPE := "weight_shape"): "shapes",
    (SCALE := "weight_scale"): "scales",
    (ZERO := "weight_zero_point"): "zero points",
}
CODES = "weight_codes"  # of a dense matrix; its scales have the name of those of a bitmask
ABOUT = {"besa": json.dumps({"format": FORMAT, "version": VERSION})}  # metadata of the weight files
DEPTHS = ("num_hidden_layers", "num_layers", "decoder_layers", "n_layers", "n_layer")  # families' names of the depth
DEEPEST = 10_000  # blocks; the deepest published models have some hundreds
OF_VERSION_1 = ("format", "version", "quantization_config")  # its header, under "besa" in config.json
DAMAGED = "the packed checkpoint is damaged"


@dataclass(frozen=True)
class Header:
    """What config.json says of a packed checkpoint.

    Attributes:
        version: of the format. Version 1 has no `quantization_config`, so that only besa loads it.
        codes: the settings of the quantiser that made the codes; None for weights without codes.
    """

    version: int
    codes: dict[str, Any] | None


def settings(folder: Path, codes: dict[str, Any] | None) -> dict[str, Any]:
    """The `quantization_config` of a packed checkpoint.

    It does not name the weight file: where besa is not installed, transformers would load that, and draw random numbers
    for all linears.

    Args:
        folder: that has its weight files already.
        codes: as of `Header`.
    """
    sharded = not (folder / f"{SPARSE_STEM}.safetensors").is_file()
    said = {"quant_method": PACKED, "format": FORMAT, "version": VERSION, "sharded": sharded}
    return said | ({"codes": codes} if codes else {})


def header(folder: Path) -> Header | None:
    """The header of a packed checkpoint; None for other checkpoints.

    Raises:
        BesaError: this besa does not know the format or its version, or config.json is damaged.
    """
    config = _config(folder)
    if not isinstance(config, dict):
        return None
    if not isinstance(config.get("besa", {}), dict):
        raise BesaError(f'{folder / "config.json"} is damaged: under "besa" it holds no settings.')
    about = config.get("quantization_config")
    if isinstance(about, dict) and about.get("quant_method") == PACKED:
        newest, codes = VERSION, about.get("codes")
    elif "format" in (about := besa_entry(config)):
        newest, codes = 1, about.get("quantization_config")
    else:
        return None
    if about.get("format") != FORMAT or about.get("version") != newest:
        said = f"{about.get('format')!r}, version {about.get('version')!r}"
        raise BesaError(
            f"{folder} is packed in the format {said}, and this besa reads {FORMAT!r}, versions 1 and {VERSION}: use "
            "the besa that packed it, or unpack it with that and pack it with this."
        )
    return Header(newest, codes)


def refuse_packed(folder: Path, name: str) -> None:
    """Refuse a packed checkpoint where dense weights are needed.

    Args:
        folder: of the checkpoint.
        name: of the model, for the error message.

    Raises:
        BesaError: it is packed, or as `header`.
    """
    if header(folder) is not None:
        raise BesaError(f"{name} is packed: make it dense with `besa unpack` first.")


def without_header(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json that a packed checkpoint had before it was packed.

    Args:
        config: of a folder with a `header`.
    """
    before = copy.deepcopy(config)
    own = besa_entry(before)
    about = before.get("quantization_config")
    if isinstance(about, dict) and about.get("quant_method") == PACKED:
        codes = before.pop("quantization_config").get("codes")
    else:
        codes = own.get("quantization_config")
    for key in OF_VERSION_1:
        own.pop(key, None)
    if not own:
        before.pop("besa", None)
    return before | ({"quantization_config": codes} if codes else {})


def tensors_of(weight: Bitmask) -> dict[str, Tensor]:
    """The tensors of one linear by the last part of their names."""
    shape = torch.tensor(weight.shape)
    tensors = {MASK: weight.masks_BCR, VALUES: weight.values, OFFSETS: weight.offsets, SHAPE: shape}
    if weight.scales_OG is not None:
        tensors[SCALE] = weight.scales_OG
    if weight.zeros_OG is not None:
        tensors[ZERO] = weight.zeros_OG
    return tensors


def tensors_of_codes(matrix: RowCodes) -> dict[str, Tensor]:
    """The tensors of a dense matrix in codes by the last part of their names."""
    return {CODES: matrix.codes_OI, SCALE: matrix.steps_O1}


class Container(WeightFiles):
    """A packed checkpoint. `read` gives the tensors it was packed from, `weights` the bitmasks to run.

    A matrix in codes is read as the numbers that these stand for.

    Attributes:
        bits: of a code; None if no weights are stored as codes.
        sparse: names of the tensors in the files, by linear stored as bitmask.
        coded: names without their last part of dense matrices stored as codes.
        dense: names of all other tensors.

    Args:
        folder: a packed checkpoint; `header` is not None.

    Raises:
        BesaError: its version is not known, or files are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        about = header(folder)
        assert about is not None
        self.bits = codes.bits_of(about.codes, str(folder)) if about.codes else None
        stored = set(self._holders)
        of_bitmasks = (MASK, VALUES, OFFSETS)
        linears = sorted({linear for linear, _, key in (name.rpartition(".") for name in stored) if key in of_bitmasks})
        self.sparse = {
            linear: [name for key in PURPOSES if (name := f"{linear}.{key}") in stored] for linear in linears
        }
        for linear, names in self.sparse.items():
            missing = [key for key in (MASK, VALUES, OFFSETS, SHAPE) if f"{linear}.{key}" not in names]
            if missing:
                raise BesaError(f"{folder} lacks {linear}.{missing[0]}: {DAMAGED}.")
        self.coded = sorted(name.removesuffix(f".{CODES}") for name in stored if name.endswith(f".{CODES}"))
        for matrix in self.coded:
            if f"{matrix}.{SCALE}" not in stored:
                raise BesaError(f"{folder} lacks {matrix}.{SCALE}: {DAMAGED}.")
        self._originals = {name: linear for linear in linears for name in self._original(linear)}
        self._matrices = {f"{matrix}.weight": matrix for matrix in self.coded}
        inside = {name for names in self.sparse.values() for name in names}
        inside |= {f"{matrix}.{key}" for matrix in self.coded for key in (CODES, SCALE)}
        self.dense = [name for name in self._holders if name not in inside]

    def _original(self, linear: str) -> list[str]:
        """Names that the tensors of a linear had before it was packed."""
        if f"{linear}.{SCALE}" not in self._holders:
            return [f"{linear}.weight"]
        zeros = f"{linear}.{ZERO}" in self._holders
        return [f"{linear}.{key}" for key in codes.KEYS if key != codes.ZERO or zeros]

    @property
    def names(self) -> list[str]:
        """Names of all tensors before packing."""
        return sorted([*self.dense, *self._originals, *self._matrices])

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all tensors before packing."""
        dense = set(self.dense)
        for name, shape in super().shapes():
            if name in dense:
                yield name, shape
            elif name.endswith(f".{CODES}"):
                yield f"{name.removesuffix(f'.{CODES}')}.weight", shape
        for linear in self.sparse:
            if f"{linear}.weight" in self._originals:
                ((_, sides),) = super().read([f"{linear}.{SHAPE}"])
                yield f"{linear}.weight", tuple(sides.tolist())
            else:
                yield from ((name, tuple(tensor.shape)) for name, tensor in self.read(self._original(linear)))

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read tensors as they were before packing, one linear at a time.

        Raises:
            BesaError: a tensor cannot be read.
        """
        linears: dict[str, None] = {}
        for name in names:
            if name in self._originals:
                linears[self._originals[name]] = None
            elif name in self._matrices:
                matrix = self._matrices[name]
                stored = dict(super().read([f"{matrix}.{CODES}", f"{matrix}.{SCALE}"]))
                yield name, RowCodes(stored[f"{matrix}.{CODES}"], stored[f"{matrix}.{SCALE}"]).unpack()
            else:
                yield from super().read([name])
        for linear in linears:
            weight = self._bitmask(linear, super().read(self.sparse[linear]))
            if weight.scales_OG is None:
                yield f"{linear}.weight", weight.unpack()
            else:
                tensors = codes.tensors_of(weight.unpack_codes())
                yield from ((f"{linear}.{key}", tensor) for key, tensor in tensors.items())

    def prefetch(self, names: Iterable[str]) -> None:
        """See `WeightFiles`."""
        linears = {self._originals[name] for name in names if name in self._originals}
        stored = [name for linear in linears for name in self.sparse[linear]]
        for name in names:
            if name in self._matrices:
                stored += [f"{self._matrices[name]}.{key}" for key in (CODES, SCALE)]
            elif name not in self._originals:
                stored.append(name)
        super().prefetch(stored)

    def weights(self) -> Iterator[tuple[str, Bitmask]]:
        """Every sparse weight by its linear; it stays in its file.

        Raises:
            BesaError: one cannot be read, or has no shape.
        """
        stored = dict(super().mapped(name for names in self.sparse.values() for name in names))
        for linear, names in self.sparse.items():
            yield linear, self._bitmask(linear, ((name, stored[name]) for name in names))

    def matrices(self) -> Iterator[tuple[str, RowCodes]]:
        """Every dense matrix in codes by its name without the last part; it stays in its file.

        Raises:
            BesaError: one cannot be read.
        """
        for matrix in self.coded:
            stored = dict(super().mapped([f"{matrix}.{CODES}", f"{matrix}.{SCALE}"]))
            yield matrix, RowCodes(stored[f"{matrix}.{CODES}"], stored[f"{matrix}.{SCALE}"])

    def parts(self, linear: str) -> dict[str, int]:
        """Bytes of the tensors of a linear, by purpose; empty if the linear is not stored as a bitmask.

        Args:
            linear: its name in the files, or in the model, which may have one more word in front.
        """
        linear = linear if linear in self.sparse else linear.partition(".")[2]
        stored = super().mapped(self.sparse.get(linear, ()))
        return {PURPOSES[name.rpartition(".")[2]]: tensor.nbytes for name, tensor in stored}

    def _bitmask(self, linear: str, tensors: Iterable[tuple[str, Tensor]]) -> Bitmask:
        by_key = {name.rpartition(".")[2]: tensor for name, tensor in tensors}
        shape = by_key[SHAPE]
        if shape.shape != (2,) or shape.dtype != torch.int64:
            raise BesaError(f"{linear}.{SHAPE} of {self.folder} holds no shape: {DAMAGED}.")
        rows, columns = shape.tolist()
        scales_OG, zeros_OG = by_key.get(SCALE), by_key.get(ZERO)
        bits = None if scales_OG is None else self.bits
        return Bitmask((rows, columns), by_key[MASK], by_key[VALUES], by_key[OFFSETS], scales_OG, zeros_OG, bits)


def open_files(folder: Path) -> WeightFiles:
    """The weight files of a checkpoint; a packed one has the names and tensors that it was packed from.

    Raises:
        BesaError: as `WeightFiles` and `Container` do, or config.json says more blocks than there are tensors.
    """
    files = WeightFiles(folder) if header(folder) is None else Container(folder)
    depth, tensors = _depth(_config(folder)), len(files.names)
    if depth > tensors:  # refused before a model of so many blocks is built
        raise BesaError(
            f"The config.json of {folder} says {depth:,.0f} blocks, its files hold {tensors:,} tensors: it is damaged, "
            "or belongs to another checkpoint."
        )
    return files


def codes_said(folder: Path) -> dict[str, Any] | None:
    """What config.json says of the quantiser that made the codes of a checkpoint, packed or not; None if nothing."""
    if packed := header(folder):
        return packed.codes
    config = _config(folder)
    return config.get("quantization_config") if isinstance(config, dict) else None


class AsDense(WeightFiles):
    """The headers that a checkpoint, packed or not, has when its weights are dense: no codes and no bitmasks.

    Args:
        files: of the checkpoint, checked.
    """

    def __init__(self, files: WeightFiles) -> None:
        super().__init__(files.folder)
        shapes, packed_parts = dict(super().shapes()), {*PURPOSES, *codes.KEYS, CODES}
        self._shapes = {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] not in packed_parts}
        for name, tensor in self.mapped([name for name in shapes if name.endswith(f".{SHAPE}")]):
            self._shapes[f"{name.removesuffix(f'.{SHAPE}')}.weight"] = tuple(tensor.tolist())
        coded = {name: shape for name, shape in shapes.items() if name.endswith(f".{CODES}")}
        self._shapes |= {f"{name.removesuffix(f'.{CODES}')}.weight": shape for name, shape in coded.items()}

    @property
    def names(self) -> list[str]:
        """Names of all weights."""
        return list(self._shapes)

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all weights."""
        yield from self._shapes.items()


def check_depth(folder: Path) -> None:
    """Check that config.json names a number of blocks that a model can have, before it is built.

    Raises:
        BesaError: it does not.
    """
    if (depth := _depth(_config(folder))) > DEEPEST:
        raise BesaError(f"The config.json of {folder} says {depth:,.0f} blocks: it is damaged.")


def _config(folder: Path) -> Any:
    """The contents of config.json; None if it cannot be read, which callers that need it report."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _depth(config: Any) -> float:
    """The largest number of blocks that a configuration or one nested in it names."""
    if not isinstance(config, dict):
        return 0
    depths = [config[key] for key in DEPTHS if isinstance(config.get(key), int | float)]
    return max([*depths, *(_depth(part) for part in config.values())], default=0)
