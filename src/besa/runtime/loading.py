"""Loading a model to run it: sparse where it is packed, as transformers does it where not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from besa.checkpoint.formats import bitmask, packed
from besa.checkpoint.formats.bitmask import Bitmask
from besa.checkpoint.formats.container import Container, header
from besa.errors import BesaError
from besa.machine import resolve_device
from besa.models.layout import fill, renaming
from besa.models.loading import Source, is_quantized, load_model, locate, read_config, read_generation_config, skeleton
from besa.models.streaming import DecoderOnDisk
from besa.progress import Progress, silent
from besa.runtime.linear import SparseLinear


def load(
    model: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> PreTrainedModel:
    """A model to evaluate or to generate text with.

    Of a packed checkpoint, linears stay packed: on the CPU their weights stay in the file, mapped into memory, and no
    weight is ever dense as a whole. Any other model is an ordinary one of transformers.

    Args:
        model: Hugging Face id, local folder (packed or not), .gguf file, or ``smollm2`` (embedded).
        device: ``cpu`` or ``cuda``.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``; in another dtype than their own,
            packed weights are converted, one at a time, and no longer in the file.
        trust_remote_code: run model code that comes with the checkpoint.
        progress: told about a download.

    Raises:
        BesaError: the model cannot be read, or there is no such device.
    """
    device = resolve_device(device)
    source = locate(model, progress)
    if not source.gguf:
        source = source.local()
        if source.folder and header(source.folder) is not None:
            return _load_packed(source, dtype, trust_remote_code).to(device)
        if not is_quantized(read_config(source, trust_remote_code)):
            DecoderOnDisk(source, dtype, trust_remote_code)  # its complaints are clearer
    return load_model(source, dtype, trust_remote_code).to(device)


def _load_packed(source: Source, dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    assert source.folder is not None
    files = Container(source.folder)
    config = read_config(source, trust_remote_code)
    config.dtype = getattr(torch, dtype) if dtype != "auto" else config.dtype or files.dtype()
    model = skeleton(source, config, trust_remote_code)
    conversions = get_model_conversion_mapping(model)
    renamed = renaming(model, conversions)
    modules = dict(model.named_modules())
    for linear, weight in files.weights():
        name = renamed(f"{linear}.weight")[0].removesuffix(".weight")
        dense = modules.get(name)
        if not isinstance(dense, nn.Linear) or (dense.out_features, dense.in_features) != weight.shape:
            raise BesaError(f"{source.name}: {linear} {weight.shape} has no place in the model that config.json says.")
        model.set_submodule(name, SparseLinear(_in_dtype(weight, config.dtype), dense.bias))
    fill(model, _dense_tensors(files), conversions, source.name)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise BesaError(f"{source.name} lacks the weight {name}: the checkpoint is incomplete.")
    model.generation_config = read_generation_config(source, model)
    return model.eval()


def _dense_tensors(files: Container) -> dict[str, Tensor]:
    """What is not packed, in its files; linears that are stored as codes but are no bitmasks, as numbers."""
    tensors = dict(files.mapped(files.dense))
    if files.bits is not None:
        coded = [name for name in tensors if name.endswith(f".{packed.WEIGHT}")]
        for linear in (name.removesuffix(f".{packed.WEIGHT}") for name in coded):
            own = {key: tensors.pop(f"{linear}.{key}") for key in packed.KEYS if f"{linear}.{key}" in tensors}
            tensors[f"{linear}.weight"] = packed.quantized(own, files.bits).weight()
    return tensors


def _in_dtype(weight: Bitmask, dtype: torch.dtype) -> Bitmask:
    if weight.dtype == dtype:
        return weight
    if weight.scales_OG is not None:
        return replace(weight, scales_OG=weight.scales_OG.to(dtype))
    return bitmask.pack(weight.unpack().to(dtype))
