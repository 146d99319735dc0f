"""Layers of a packed checkpoint in a transformers model: put in place before its tensors are loaded, finished after.

A linear stored as bitmask becomes a `SparseLinear`, whose buffers have the names of the stored tensors, so that
transformers loads them as any others. So do a head and embeddings in codes of eight bits. A linear stored as codes of
compressed-tensors has these as buffers, and becomes dense when they are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import build_glob_alternation

from besa.checkpoint.checking import check_layout, check_packed
from besa.errors import BesaError
from besa.models.ends import ends
from besa.models.layout import renaming
from besa.models.plain_linears import plain_linears
from besa.runtime import attention, block_decoding, decoding, norms
from besa.runtime.coded import Coded, CodedEmbedding, CodedLinear
from besa.runtime.dense import DenseLinear
from besa.runtime.linear import SparseLinear
from besa.runtime.saving import saving
from besa.storage.formats import bitmask, codes
from besa.storage.formats.bitmask import Bitmask
from besa.storage.formats.container import CODES, Container, header, settings
from besa.storage.formats.row_codes import RowCodes
from besa.storage.weights import SPARSE_STEM


@dataclass
class Stored:
    """What the files of a checkpoint hold for its packed linears, mapped from them.

    Attributes:
        bits: of a code; None if no weights are stored as codes.
        sparse: weights stored as bitmasks, by name of the linear in the model.
        coded: tensors of linears stored as codes, by name in the model and last part of their own names.
        ends: matrices of the head and the embeddings stored as codes, by name of the module.
    """

    bits: int | None
    sparse: dict[str, Bitmask] = field(default_factory=dict)
    coded: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    ends: dict[str, RowCodes] = field(default_factory=dict)


def lay_out(model: PreTrainedModel, paths: Sequence[Path]) -> Stored:
    """Check a packed checkpoint, and put layers that hold its tensors into the model.

    Args:
        model: of the folder's configuration, without memory for weights.
        paths: of the weight files that transformers will load, in the folder of the checkpoint.

    Raises:
        BesaError: the checkpoint is damaged or incomplete, or belongs to another configuration; or the folder has
            other weights too.
    """
    folder = paths[0].parent
    if header(folder) is None:
        raise BesaError(f"{folder} is not packed, though its config.json was: put the files of one checkpoint into it.")
    with torch.device("cpu"):
        files = Container(folder)
        if {path.resolve() for path in files.paths} != {path.resolve() for path in paths}:
            raise BesaError(f"{folder} holds weight files of two checkpoints: remove those that do not belong to it.")
        check_packed(files)
        _check_layout(folder, files, model)
        renamed = renaming(model, get_model_conversion_mapping(model))
        linears, dtype = plain_linears(model), model.dtype

        def placed(stored: str) -> str:
            return renamed(f"{stored}.weight")[0].removesuffix(".weight")

        def place(stored: str, shape: tuple[int, ...]) -> tuple[str, nn.Linear]:
            linear = linears.get(name := placed(stored))
            if linear is None or (linear.out_features, linear.in_features) != shape:
                raise BesaError(f"{folder}: {stored} {shape} has no place in the model of its config.json.")
            return name, linear

        packed = Stored(files.bits)
        for stored, weight in files.weights():
            name, linear = place(stored, weight.shape)
            model.set_submodule(name, SparseLinear(weight, linear.bias))
            packed.sparse[name] = weight
        tensors = dict(files.mapped(files.dense))
        for stored in codes.linears(tensors):
            of_linear = codes.of_linear(tensors, stored)
            name, linear = place(stored, tuple(of_linear[codes.SHAPE].tolist()))
            packed.coded[name] = of_linear
            model.set_submodule(name, linear := DenseLinear(linear))
            linear.register_parameter("weight", None)
            for key, tensor in of_linear.items():
                linear.register_buffer(key, tensor)
        packed.ends = {placed(stored): matrix for stored, matrix in files.matrices()}
        if packed.ends:
            _lay_out_ends(model, packed.ends, dtype)
        for name, module in list(model.named_modules()):  # now: what accelerate hooks onto must stay
            if type(module) is nn.Linear:
                model.set_submodule(name, DenseLinear(module))
        of_linears = [tensor for tensors in files.sparse.values() for tensor in tensors]
        of_ends = [f"{stored}.{CODES}" for stored in files.coded if placed(stored) in packed.ends]
        _check_names(folder, [*of_linears, *of_ends], model)
    return packed


def _check_names(folder: Path, stored: Sequence[str], model: PreTrainedModel) -> None:
    """Check that transformers finds the tensors of packed matrices, some of which it renames by their whole names.

    Args:
        folder: of the files.
        stored: names in the files.
        model: laid out.

    Raises:
        BesaError: it does not, and would leave random numbers.
    """
    renamed, state = renaming(model, get_model_conversion_mapping(model)), model.state_dict()
    for name in stored:
        if renamed(name)[0] not in state:
            raise BesaError(f"{folder}: {name} has no place in the model of its config.json.")


def _check_layout(folder: Path, files: Container, model: PreTrainedModel) -> None:
    """Check that the files have all tensors that the model needs.

    Raises:
        BesaError: they have not, or the model has another head than the one that was packed.
    """
    try:
        check_layout(str(folder), files, model)
    except BesaError as error:
        kinds, kind = model.config.architectures or [], type(model).__name__
        head = [name for name in model.state_dict() if not name.startswith(f"{model.base_model_prefix}.")]
        other = kinds and kind not in kinds and model is not model.base_model
        if not other or not any(f" {name}" in str(error) for name in head):
            raise
        raise BesaError(
            f"{folder} holds a {kinds[0]}, no {kind}: for another head, make it dense with `besa unpack`."
        ) from error


def _lay_out_ends(model: PreTrainedModel, matrices: dict[str, RowCodes], dtype: torch.dtype) -> None:
    """Put modules that compute with codes in place of the head and the embeddings.

    Args:
        model: checked, but for the layers of its linears.
        matrices: by name of the module; those without a module go, as a model may have no head.
        dtype: that the model will have.
    """
    modules = {name: model.get_submodule(name) for name in ends(model)}
    for name in set(matrices) - set(modules):
        del matrices[name]
    tied = {name.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for name in pair}
    lender = next((name for name in matrices if name in tied), None)
    made: dict[str, Coded] = {}
    for name, module in sorted(modules.items(), key=lambda item: item[0] not in matrices):  # lenders first
        borrows = name not in matrices
        if borrows and (lender is None or name not in tied):
            continue
        matrix = made[str(lender)] if borrows else replace(matrices[name], steps_O1=matrices[name].steps_O1.to(dtype))
        embeds = isinstance(module, nn.Embedding)
        made[name] = CodedEmbedding(matrix, module) if embeds else CodedLinear(matrix, module.bias)
        model.set_submodule(name, made[name])
    if made:  # nothing is left for transformers to tie
        gone = {f"{name}.weight" for name in made}
        kept = {to: of for to, of in model.all_tied_weights_keys.items() if not gone & {to, of}}
        model.all_tied_weights_keys, model._tied_weights_keys = dict(kept), dict(kept)


def finish(model: PreTrainedModel, packed: Stored) -> PreTrainedModel:
    """The model that was laid out, with its tensors loaded: in its dtype, without gradients.

    transformers keeps some linears of some families in float32, and casts all their tensors, masks and codes too. Those
    are taken from the files once more.

    Args:
        model: after `lay_out`.
        packed: as `lay_out` returned it.

    Raises:
        BesaError: a weight was left on the disk, its numbers are too large for the dtype, or layers were split between
            processes.
    """
    if getattr(model, "_tp_size", None) is not None:
        raise BesaError("Packed weights cannot be split between processes: load them without a tensor parallel plan.")
    for name, stored in packed.sparse.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, SparseLinear)
        weight, device = linear.bitmask, linear.bitmask.masks_BCR.device
        cast = weight.masks_BCR.is_floating_point()
        linear.keep(_in_dtype(stored, weight.dtype, name) if cast else _in_dtype(weight, model.dtype, name))
        linear.to(device)
    for name, of_linear in packed.coded.items():
        assert packed.bits is not None
        dense = model.get_submodule(name)
        loaded = dense.get_buffer(codes.WEIGHT)
        dtype = loaded.dtype if loaded.is_floating_point() else model.dtype
        for key in of_linear:
            delattr(dense, key)
        _check_room(loaded, name)
        dense.weight = nn.Parameter(codes.quantized(of_linear, packed.bits).weight().to(loaded.device, dtype))
    for name, matrix in packed.ends.items():
        end = model.get_submodule(name)
        assert isinstance(end, Coded)
        _check_room(end.weight_codes, name)
        _check_room(end.weight_scale, name)
        end.keep(_as_loaded(end.matrix, matrix, model.dtype, name))
    attention.speed_up(model)
    norms.speed_up(model)
    decoding.speed_up(model)
    block_decoding.speed_up(model)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.save_pretrained, part._apply = partial(_refuse_part, part), partial(_move, part)
    model.save_pretrained = partial(save_pretrained, model, list(packed.coded))  # which pickle can write
    return model.requires_grad_(False)


def make_dense(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with ordinary linears in place of sparse ones; pruned weights are zeros.

    Args:
        model: as `finish` returned it.
        dtype: of the linears; if it is another than the model's, of all. What transformers keeps in float32 stays so.
    """
    others, plan = model.dtype, list(model._get_dtype_plan(dtype))
    exact = build_glob_alternation(plan)[0] if plan else None
    weights: dict[int, nn.Parameter] = {}  # of the head and the embeddings, by their codes
    for name, module in dict(model.named_modules()).items():
        if isinstance(module, CodedEmbedding | CodedLinear):
            matrix = module.matrix
            weight = nn.Parameter(matrix.unpack().to(dtype))
            model.set_submodule(name, module.dense(weights.setdefault(id(matrix.codes_OI), weight)))
        if isinstance(module, SparseLinear):
            dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            kept = exact and exact.search(name)
            dense.weight = nn.Parameter(module.weight if kept else module.weight.to(dtype))
            dense.register_parameter("bias", module.bias)
            model.set_submodule(name, dense)
        if isinstance(module, DenseLinear):
            model.set_submodule(name, module.plain())
    if weights:
        del model._tied_weights_keys  # its class has them
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    attention.restore(model)
    norms.restore(model)
    decoding.restore(model)
    block_decoding.restore(model)
    for part in model.modules():
        vars(part).pop("save_pretrained", None)  # its class has one for dense models
        if isinstance(part, PreTrainedModel):
            vars(part).pop("_apply", None)
    if dtype != others:
        for name, tensor in model.state_dict(keep_vars=True).items():  # without what rotary positions are made of
            if tensor.is_floating_point() and not (exact and exact.search(name)):
                tensor.data = tensor.data.to(dtype)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # as of a model that was loaded dense
    return model


def save_pretrained(model: PreTrainedModel, decoded: Sequence[str], save_directory: str | Path, **options: Any) -> None:
    """`save_pretrained` of a model with sparse layers: it writes a packed checkpoint.

    transformers would name the weight file as that of any model, and load it with random linears where besa is absent.

    Args:
        model: as `finish` returned it.
        decoded: names of the linears that were codes of compressed-tensors, and are written as numbers.
        save_directory: folder to fill.
        options: as of transformers' method.

    Raises:
        BesaError: as `saving`.
    """
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers saves the adapters alone
        type(model).save_pretrained(model, save_directory, **options)
        return
    if not options.pop("is_main_process", True):
        return
    with saving(model, Path(save_directory), SPARSE_STEM, options) as (made, config):
        of_codes = config["quantization_config"]["codes"]
        if decoded:
            of_codes = of_codes | {"ignore": [*dict.fromkeys([*of_codes.get("ignore", []), *decoded])]}
        config["quantization_config"] = settings(made, of_codes)


def _move(model: PreTrainedModel, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PreTrainedModel:
    """`_apply` of a packed model: before anything changes, its linears say whether they can follow."""
    for part in model.modules():
        if isinstance(part, SparseLinear):
            part.check_dtype(fn)
    moved: PreTrainedModel = type(model)._apply(model, fn, recurse)
    return moved


def _refuse_part(model: PreTrainedModel, *_: Any, **__: Any) -> None:
    raise BesaError(f"{type(model).__name__} is a part of a packed model: save the whole, or make it dense first.")


def _as_loaded(loaded: RowCodes, stored: RowCodes, dtype: torch.dtype, name: str) -> RowCodes:
    """A matrix in the dtype of the model, or in that which transformers keeps it in."""
    if loaded.codes_OI.is_floating_point():  # cast
        matrix = RowCodes(stored.codes_OI.to(loaded.codes_OI.device), loaded.steps_O1)
    else:
        matrix = RowCodes(loaded.codes_OI, loaded.steps_O1.to(dtype))
    matrix.check(name)
    return matrix


def _check_room(tensor: Tensor, name: str) -> None:
    if tensor.is_meta:
        raise BesaError(f"There is no room for {name} in memory, and packed weights cannot be offloaded: free some.")


def _in_dtype(weight: Bitmask, dtype: torch.dtype, name: str) -> Bitmask:
    _check_room(weight.masks_BCR, name)
    if weight.dtype == dtype:
        return weight
    if weight.scales_OG is not None:
        converted = replace(weight, scales_OG=weight.scales_OG.to(dtype))
    else:
        converted = bitmask.pack(weight.unpack().to(dtype))
    converted.check(name)
    return converted
