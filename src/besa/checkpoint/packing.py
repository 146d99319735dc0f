"""Packing a pruned checkpoint to make it smaller, and unpacking it, with one block in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping

from besa.checkpoint.checking import check_complete, check_packed
from besa.checkpoint.companions import read_config_json, with_dtype
from besa.checkpoint.rewriting import folder_of, local, rewrite, size_of
from besa.checkpoint.writer import disk_bytes
from besa.data.arguments import Dtype, Head, checked
from besa.errors import BesaError
from besa.models.ends import ends
from besa.models.finding import find_blocks
from besa.models.layout import in_dtype, renaming
from besa.models.loading import quantization_of, read_config
from besa.models.plain_linears import plain_linears
from besa.models.source import Source
from besa.models.widths import refuse
from besa.progress import Progress, silent
from besa.record import RunRecord
from besa.storage.entry import besa_entry
from besa.storage.formats import bitmask, codes, row_codes
from besa.storage.formats.bitmask import is_positive
from besa.storage.formats.container import (
    CODES,
    Container,
    header,
    open_files,
    tensors_of,
    tensors_of_codes,
    without_header,
)
from besa.storage.weights import SPARSE_STEM, STEM, WeightFiles
from besa.storage.writing import appearing, check_space


class Packing(BaseModel):
    """What packing did to a checkpoint.

    Attributes:
        linears: number of plain linears in the decoder blocks.
        packed: number of these that became bitmasks; the others would not get smaller.
        dense_bytes: size of the packed linears before.
        packed_bytes: size of the packed linears after.
        head_dense_bytes: size of the head and the embeddings before, where they were stored in codes.
        head_bytes: their size after.
        file_bytes_before: of all weight files of the model.
        file_bytes: of all weight files that were written.
    """

    linears: int
    packed: int = 0
    dense_bytes: int = 0
    packed_bytes: int = 0
    head_dense_bytes: int = 0
    head_bytes: int = 0
    file_bytes_before: int
    file_bytes: int = 0


@dataclass
class _Group:
    """Tensors that are in memory together.

    Attributes:
        name: of the block, or of a single tensor outside the blocks.
        weights: names in the files of the model's parameters.
        others: names of buffers and of tensors that the model has no module for; these are never rounded.
        linears: names in the files of the plain linears among the weights, in order.
        is_head: whether it is the head or the embeddings, and is to be stored as codes.
    """

    name: str
    weights: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    linears: dict[str, None] = field(default_factory=dict)
    is_head: bool = False

    def read(self, files: WeightFiles) -> Iterator[tuple[str, Tensor]]:
        """Its tensors. Weights must be finite; the others may hold infinity, as bounds and masks do."""
        yield from files.read(self.weights)
        yield from files.mapped(self.others)


@checked
def pack(
    model: str | Path,
    out: str | Path,
    *,
    dtype: Dtype = "auto",
    head: Head = "same",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Packing:
    """Write a pruned checkpoint with its linears as bitmasks: it is smaller, and `besa.load` runs it without unpacking.

    Only plain linears of decoder blocks that get smaller are packed. GPT-2's transposed linears and fused stacks of
    experts stay dense, and so do embeddings and the head unless `head` says otherwise.

    Args:
        model: Hugging Face id or local folder: safetensors, dense or ``pack-quantized``.
        out: folder to write; must not exist.
        dtype: ``auto`` keeps every number bit-equal, except negative zeros, which become zeros; ``float32``,
            ``bfloat16`` or ``float16`` rounds first.
        head: ``same`` stores the head and the embeddings as they are; ``int8`` rounds them to codes of eight bits, on a
            symmetric grid for each row, which halves what they take in half precision.
        trust_remote_code: run model code that comes with the checkpoint.
        progress: called with (parts done, number of parts, name of the part).

    Raises:
        BesaError: the model cannot be read, is incomplete or packed already, or would not get smaller; its head or its
            embeddings cannot be stored as codes; or `out` exists or cannot be written.
    """
    source = local(model, out, progress, trust_remote_code)
    if header(folder_of(source)) is not None:
        raise BesaError(f"{model} is packed already: copy the folder, or make it dense with `besa unpack`.")
    refuse(source.name, read_config(source))
    files = open_files(folder_of(source))
    check_packed(files)
    quantization = quantization_of(read_config(source))
    if quantization and dtype != "auto":
        raise BesaError(f"{model} holds codes, which cannot be rounded to another dtype: leave out --dtype.")
    bits = codes.bits_of(quantization, str(model)) if quantization else None
    groups = _groups(source, files, head)
    packing = Packing(linears=sum(len(group.linears) for group in groups), file_bytes_before=size_of(files.paths))

    def parts() -> Iterator[dict[str, Tensor]]:
        for done, group in enumerate(groups, start=1):
            tensors = dict(group.read(files))
            if dtype != "auto":
                tensors |= {name: in_dtype(name, tensors[name], getattr(torch, dtype)) for name in group.weights}
            for linear in group.linears:
                _pack_linear(tensors, linear, bits, packing)
            if group.is_head:
                _code_head(tensors, group.name, packing)
            yield tensors
            progress(done, len(groups), group.name)
        if not packing.packed and not packing.head_bytes:
            raise BesaError(f"{model}: no linear would get smaller, {_why_not(packing, files, bits)}.")

    config = read_config_json(folder_of(source))
    if dtype != "auto":
        config = with_dtype(config, dtype)
    if any(group.is_head for group in groups):
        config["besa"] = besa_entry(config) | {"head": head}  # which stays true of what `unpack` writes
    with appearing(Path(out)) as folder:
        check_space(Path(out), disk_bytes(_least_bytes(source, files, groups, dtype, bits)))
        rewrite(source, folder, parts(), config, SPARSE_STEM)
        packing.file_bytes = size_of(folder.glob("*.safetensors"))
    return packing


@checked
def unpack(model: str | Path, out: str | Path, *, trust_remote_code: bool = False, progress: Progress = silent) -> None:
    """Write the dense checkpoint that was packed, with bit-equal tensors.

    Args:
        model: folder that `pack` wrote.
        out: folder to write; must not exist.
        trust_remote_code: run model code that comes with the checkpoint.
        progress: called with (parts done, number of parts, name of the part).

    Raises:
        BesaError: the model is not packed, is incomplete or damaged; or `out` exists or cannot be written.
    """
    source = local(model, out, progress, trust_remote_code)
    if header(folder_of(source)) is None:
        raise BesaError(f"{model} is not packed: `besa unpack` takes what `besa pack` wrote.")
    files = open_files(folder_of(source))
    check_packed(files)
    groups = _groups(source, files, "same")

    def parts() -> Iterator[dict[str, Tensor]]:
        for done, group in enumerate(groups, start=1):
            yield dict(group.read(files))
            progress(done, len(groups), group.name)

    config = without_header(read_config_json(folder_of(source)))
    with appearing(Path(out)) as folder:
        check_space(Path(out), disk_bytes(_unpacked_bytes(files)))
        rewrite(source, folder, parts(), config, STEM)


def _least_bytes(source: Source, files: WeightFiles, groups: list[_Group], dtype: Dtype, bits: int | None) -> int:
    """The bytes that packed tensors take at least, from headers and from the zeros that the record counts.

    Args:
        source: of the files.
        files: of the checkpoint that is packed.
        groups: of its tensors.
        dtype: as of `pack`.
        bits: of its codes; None if it has none.
    """
    record = RunRecord.known(folder_of(source))
    sizes = {name: (tensor.numel(), tensor.nbytes) for name, tensor in files.mapped(files.names)}
    others = linears = weights = 0
    for group in groups:
        packed = {f"{linear}.{key}" for linear in group.linears for key in ("weight", codes.WEIGHT)}
        for name in (*group.weights, *group.others):
            number, size = sizes[name]
            if dtype != "auto" and name in group.weights:
                size = number * getattr(torch, dtype).itemsize
            if name in packed:
                linears, weights = linears + size, weights + (number if bits is None else 8 * size // bits)
            else:
                others += number if group.is_head else size
    zeros = weights if record is None else min(record.zeros, weights)
    return others + linears * (weights - zeros) // max(1, weights)


def _unpacked_bytes(files: WeightFiles) -> int:
    """The bytes that the tensors of a packed checkpoint take when they are unpacked, from headers."""
    assert isinstance(files, Container)
    sizes = [tensor.nbytes for _, tensor in files.mapped(files.dense)]
    sizes += [matrix.codes_OI.numel() * matrix.dtype.itemsize for _, matrix in files.matrices()]
    for _, weight in files.weights():
        sizes.append(math.prod(weight.shape) * (weight.bits or 8 * weight.dtype.itemsize) // 8)
    return sum(sizes)


def _pack_linear(tensors: dict[str, Tensor], linear: str, bits: int | None, packing: Packing) -> None:
    """Replace the tensors of a linear by those of its bitmask if these are smaller."""
    dense = {key: tensors[f"{linear}.{key}"] for key in ("weight", *codes.KEYS) if f"{linear}.{key}" in tensors}
    if f"{linear}.weight_g_idx" in tensors:
        raise BesaError(f"{linear} has its columns in another order (weight_g_idx), which bitmasks cannot hold.")
    if "weight" not in dense:
        assert bits is not None
        weight = bitmask.pack_codes(codes.quantized(dense, bits))
    elif dense["weight"].dtype in bitmask.FLOATS:
        weight = bitmask.pack(dense["weight"])
    else:
        return
    sparse = tensors_of(weight)
    before, after = (sum(tensor.nbytes for tensor in stored.values()) for stored in (dense, sparse))
    if after < before:
        for key in dense:
            del tensors[f"{linear}.{key}"]
        tensors |= {f"{linear}.{key}": tensor for key, tensor in sparse.items()}
        packing.packed += 1
        packing.dense_bytes += before
        packing.packed_bytes += after


def _code_head(tensors: dict[str, Tensor], name: str, packing: Packing) -> None:
    """Replace the weight of the head or of the embeddings by its codes.

    Raises:
        BesaError: it has a dtype that codes cannot have, or numbers whose step is none.
    """
    dense_OI = tensors.pop(name)
    coded = row_codes.pack(dense_OI)
    if not is_positive(coded.steps_O1):
        raise BesaError(f"{name} has numbers that are too large for codes of eight bits: pack it with --head same.")
    tensors |= {f"{name.removesuffix('.weight')}.{key}": tensor for key, tensor in tensors_of_codes(coded).items()}
    packing.head_dense_bytes += dense_OI.nbytes
    packing.head_bytes += coded.nbytes


def _groups(source: Source, files: WeightFiles, head: str) -> list[_Group]:
    """All tensors of the files: one group for each block, and one for each other tensor, as embeddings are large.

    Args:
        source: of the files.
        files: of a checkpoint, checked.
        head: as of `pack`.

    Raises:
        BesaError: the files lack tensors of the model, or its head or embeddings cannot be stored as codes.
    """
    empty = check_complete(source, files, read_config(source))
    blocks = find_blocks(empty)
    plain = plain_linears(empty).keys() & {name for block in blocks for name in block.prunables}
    renamed = renaming(empty, get_model_conversion_mapping(empty))
    parameters = {name for name, _ in empty.named_parameters(remove_duplicate=False)}
    heads = {f"{name}.weight" for name in (ends(empty) if head == "int8" else ())}
    of_blocks = {block.name: _Group(block.name) for block in blocks}
    groups: list[_Group] = []
    for stored in files.names:
        linear, _, last = stored.rpartition(".")
        name, merged = renamed(f"{linear}.weight" if last in codes.KEYS else stored)
        group = next((of_blocks[block.name] for block in blocks if name.startswith(f"{block.name}.")), None)
        if group is None:
            group = _Group(stored, is_head=name in heads and not merged)
            groups.append(group)
            if group.is_head and not _found(renamed(f"{linear}.{CODES}")[0], name):
                raise BesaError(
                    "The head and the embeddings cannot be stored as codes, as transformers would not find those of "
                    f"{stored}, which it renames by its whole name: leave out --head."
                )
        (group.weights if merged or name in parameters else group.others).append(stored)
        if last in ("weight", *codes.KEYS) and not merged and name.removesuffix(".weight") in plain:
            group.linears[linear] = None
    return [*groups, *of_blocks.values()]


def _found(stored: str, name: str) -> bool:
    """Whether codes that have this name after renaming are in the module of a weight of that name.

    The beginning that the base model adds may be missing, as it is added only to names that the model has.
    """
    return f".{name}".endswith(f".{stored.removesuffix(CODES)}weight")


def _why_not(packing: Packing, files: WeightFiles, bits: int | None) -> str:
    """The reason why nothing was packed, and what to do.

    Args:
        packing: what was done.
        files: of the checkpoint.
        bits: of its codes; None if it has none.
    """
    if not packing.linears:
        return "because its blocks have no plain linears: transposed linears and stacks of experts are not packed"
    if files.dtype() not in bitmask.FLOATS:
        return f"because bitmasks cannot hold {str(files.dtype()).removeprefix('torch.')}: choose --dtype float32"
    if bits is not None:
        taken = 4 if bits <= 4 else 8
        least = 100 * (1 - (bits - 1) / taken)
        return (
            f"because a bitmask takes {taken} bits for each kept code of {bits}, and one more for every weight: "
            f"prune more than {least:g} % of them"
        )
    return "because it has too few zeros: prune it first"
