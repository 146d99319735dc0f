"""Opening a model to prune it: from the disk, in memory, or as the caller loaded it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa.checkpoint.companions import companions
from besa.errors import BesaError
from besa.models.borrowing import check_dtype_of_caller, check_memory_of_caller, tokenizer_of_caller
from besa.models.loading import (
    check_decoder,
    describe,
    is_quantized,
    load_model,
    load_tokenizer,
    read_config,
    skeleton_like,
)
from besa.models.source import Source
from besa.models.streaming import Decoder, DecoderInMemory, DecoderOnDisk
from besa.models.widths import refuse
from besa.storage.formats.container import refuse_packed
from besa.storage.weights import WIDTHS


def open_decoder(
    model: Source | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, dtype: str, from_disk: bool
) -> tuple[Decoder, PreTrainedTokenizerBase, dict[str, Any]]:
    """Decoder, tokenizer and identity of a model.

    Args:
        model: a local source, or loaded by the caller.
        tokenizer: needed with a loaded model; otherwise the model's own by default.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``; a loaded model keeps its own.
        from_disk: the result will be written, so leave the weights on the disk. A .gguf file is loaded all the same.

    Raises:
        BesaError: the model cannot be read, is packed or quantised, has an adapter or, loaded, another dtype; or it
            could be pruned but not written (`from_disk`).
    """
    if isinstance(model, PreTrainedModel):
        check_decoder(type(model).__name__, model.config)
        _check_parameters(model)
        _check_own(model)
        if from_disk:
            refuse(type(model).__name__, model.config)
            _check_described(model)
        check_dtype_of_caller(model, dtype)
        return DecoderInMemory(model), tokenizer_of_caller(tokenizer), describe(model)
    if model.gguf:
        decoder: Decoder = DecoderInMemory(load_model(model, dtype))
    else:
        decoder = _decoder_of_folder(model, dtype, from_disk)
    return decoder, tokenizer or load_tokenizer(model), describe(decoder.model, model)


def _check_parameters(model: PreTrainedModel) -> None:
    """Refuse a loaded model whose weights cannot be changed.

    Raises:
        BesaError: one of them has no memory, or is a tensor of torch's inference mode.
    """
    check_memory_of_caller(model)
    for name, weight in model.named_parameters():
        if weight.is_inference():
            owner = f"{name} of {type(model).__name__}"
            raise BesaError(f"{owner} was made in inference mode, where no gradients are: load the model outside it.")


def _check_own(model: PreTrainedModel) -> None:
    """Refuse a loaded model whose linears are not matrices of its own.

    Raises:
        BesaError: it is quantised or packed, or has an adapter.
    """
    name, quantizer = type(model).__name__, getattr(model, "hf_quantizer", None)
    coded = quantizer is not None and quantizer.quantization_config.quant_method != WIDTHS
    if coded or is_quantized(model.config):
        raise BesaError(
            f"{name} was loaded from packed or quantised weights: prune the model that they were made from."
        )
    if any(type(part).__module__.partition(".")[0] == "peft" for part in model.modules()):
        raise BesaError(f"{name} has an adapter: merge it into the weights first (`merge_and_unload` of peft).")


def _check_described(model: PreTrainedModel) -> None:
    """Refuse a loaded model that has other weights than its configuration says: a folder could not give it back.

    Raises:
        BesaError: a weight is missing, added, or of another shape.
    """
    described, own = (
        {name: tuple(weight.shape) for name, weight in each.named_parameters(remove_duplicate=False)}
        for each in (skeleton_like(model, model.config), model)
    )
    for name in sorted(described.keys() | own.keys()):
        if described.get(name) != own.get(name):
            given, built = _shape(own.get(name)), _shape(described.get(name))
            raise BesaError(
                f"{name} of {type(model).__name__} is {given}, but {built} by its config, so no folder can give this "
                "model back: prune it without out, or make the config describe it."
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else f"of shape {shape}"


def _decoder_of_folder(source: Source, dtype: str, from_disk: bool) -> Decoder:
    """The decoder of a folder of safetensors, on the disk or in memory.

    Raises:
        BesaError: the folder is packed or damaged, or, `from_disk`, its model could be pruned but not written.
    """
    assert source.folder is not None
    refuse_packed(source.folder, source.name)
    refuse(source.name, read_config(source))
    if from_disk or not is_quantized(read_config(source)):
        on_disk = DecoderOnDisk(source, dtype)  # its error messages are the clearest, also where the model is loaded
        if from_disk:
            on_disk.check_writable()
            companions(source.folder)
            return on_disk
    return DecoderInMemory(load_model(source, dtype))
