"""Loading a model to run it: packed linears stay sparse, any other model is loaded by transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from besa.checkpoint.checking import check_complete, check_packed
from besa.checkpoint.verification import verify as verify_folder
from besa.data.arguments import Dtype, checked
from besa.errors import BesaError
from besa.models.layout import load_tensors, renaming, tie
from besa.models.loading import Source, is_quantized, load_model, locate, read_config, read_generation_config, skeleton
from besa.models.streaming import DecoderOnDisk
from besa.progress import Progress, silent
from besa.runtime.linear import SparseLinear
from besa.storage.formats import bitmask, codes
from besa.storage.formats.bitmask import Bitmask
from besa.storage.formats.container import Container, open_files
from besa.storage.weights import is_finite
from besa.system.devices import check_dtype, resolve_device


@checked
def load(
    model: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    verify: bool = False,
    progress: Progress = silent,
) -> PreTrainedModel:
    """Load a model for evaluation or text generation.

    The linears of a packed checkpoint stay packed. On the CPU their weights stay in the file, mapped into memory, and
    no weight is ever dense as a whole. Any other model becomes an ordinary model of transformers.

    Args:
        model: Hugging Face id, local folder (packed or not), .gguf file, or ``smollm2`` (embedded).
        device: as in `besa.compress`; the whole model goes there.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``; to change their dtype,
            packed weights are converted one at a time, and are then in memory instead of the file.
        trust_remote_code: run model code that comes with the checkpoint.
        verify: first compare the files with the digests in besa's record.
        progress: told about a download, and about files that are verified.

    Raises:
        BesaError: the model cannot be read, is incomplete, has changed since it was written (`verify`) or holds NaN or
            infinity; or there is no such device, or it has no numbers of the model's dtype.
    """
    device = resolve_device(device)
    source = locate(model, progress, trust_remote_code=trust_remote_code).local()
    if verify:
        verify_folder(source.location, progress=progress)
    return load_source(source, device, dtype)


def load_source(source: Source, device: torch.device, dtype: str) -> PreTrainedModel:
    """Load a model that was located; arguments as of `load`.

    Raises:
        BesaError: as `load`.
    """
    source = source.local()
    loaded = load_model(source, dtype) if source.gguf else _load_folder(source, dtype)
    check_dtype(loaded.dtype, device)
    for name, parameter in loaded.named_parameters():
        if not is_finite(parameter):
            too_large = "" if dtype == "auto" else f", or its numbers are too large for {dtype}"
            raise BesaError(
                f"The tensor {name} of {source.name} holds NaN or infinity: the checkpoint is damaged{too_large}."
            )
    return loaded.to(device)


def _load_folder(source: Source, dtype: str) -> PreTrainedModel:
    """A model of safetensors, whose files besa checks first, because its error messages are clearer."""
    assert source.folder is not None
    files = open_files(source.folder)
    check_packed(files)
    config = read_config(source)
    if isinstance(files, Container) or is_quantized(config):
        check_complete(source, files, config)
    else:
        DecoderOnDisk(source, dtype)
    if isinstance(files, Container):
        return _load_packed(source, files, config, dtype)
    return load_model(source, dtype)


def _load_packed(source: Source, files: Container, config: PreTrainedConfig, dtype: str) -> PreTrainedModel:
    config.dtype = getattr(torch, dtype) if dtype != "auto" else config.dtype or files.dtype()
    model = skeleton(source, config)
    conversions = get_model_conversion_mapping(model)
    renamed = renaming(model, conversions)
    modules = dict(model.named_modules())
    for linear, weight in files.weights():
        name = renamed(f"{linear}.weight")[0].removesuffix(".weight")
        dense = modules.get(name)
        if not isinstance(dense, nn.Linear) or (dense.out_features, dense.in_features) != weight.shape:
            raise BesaError(f"{source.name}: {linear} {weight.shape} has no place in the model of its config.json.")
        model.set_submodule(name, SparseLinear(_in_dtype(weight, config.dtype, linear), dense.bias))
    load_tensors(model, _dense_tensors(files), conversions, source.name)
    tie(model)
    model.generation_config = read_generation_config(source, model)
    return model.eval()


def _dense_tensors(files: Container) -> dict[str, Tensor]:
    """The tensors that are not bitmasks, mapped from their files; linears stored as codes are dequantised."""
    tensors = dict(files.mapped(files.dense))
    for linear in codes.linears(tensors):
        of_linear = codes.of_linear(tensors, linear)
        assert files.bits is not None
        tensors[f"{linear}.weight"] = codes.quantized(of_linear, files.bits).weight()
        for key in of_linear:
            del tensors[f"{linear}.{key}"]
    return tensors


def _in_dtype(weight: Bitmask, dtype: torch.dtype, name: str) -> Bitmask:
    if weight.dtype == dtype:
        return weight
    if weight.scales_OG is not None:
        converted = replace(weight, scales_OG=weight.scales_OG.to(dtype))
    else:
        converted = bitmask.pack(weight.unpack().to(dtype))
    converted.check(name)
    return converted
