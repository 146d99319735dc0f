"""Load a model to run it: packed linears stay sparse; transformers loads any other model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from besa.checkpoint.checking import check_complete, check_packed
from besa.checkpoint.verification import verify as verify_folder
from besa.data.arguments import Dtype, checked
from besa.errors import BesaError
from besa.models.loading import is_quantized, load_model, read_config
from besa.models.source import Source, locate
from besa.models.streaming import DecoderOnDisk
from besa.progress import Progress, silent
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
    source = locate(model, progress, trust_remote_code=trust_remote_code).local(progress)
    if verify:
        verify_folder(source.location, progress=progress)
    return load_source(source, device, dtype)


def load_source(source: Source, device: torch.device, dtype: str) -> PreTrainedModel:
    """Load a model that was located; arguments as of `load`.

    Raises:
        BesaError: as `load`.
    """
    source = source.local()
    if not source.gguf:
        _check(source, dtype)
    loaded = load_model(source, dtype)
    check_dtype(loaded.dtype, device)
    for name, parameter in loaded.named_parameters():
        if not is_finite(parameter):
            too_large = "" if dtype == "auto" else f", or its numbers are too large for {dtype}"
            raise BesaError(
                f"The tensor {name} of {source.name} holds NaN or infinity: the checkpoint is damaged{too_large}."
            )
    return loaded.to(device)


def _check(source: Source, dtype: str) -> None:
    """Check a folder of safetensors before transformers loads it, because besa's error messages are clearer.

    Packed folders are checked while they are loaded, whoever loads them (`besa.runtime.packed`).
    """
    assert source.folder is not None
    files = open_files(source.folder)
    if isinstance(files, Container):
        return
    config = read_config(source)
    if is_quantized(config):
        check_packed(files)
        check_complete(source, files, config)
    else:
        DecoderOnDisk(source, dtype)
