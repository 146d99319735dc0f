"""Opening a model: its weights, its configuration, its tokenizer, or modules without weights."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from compressed_tensors.offload import remove_dispatch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from besa.counting.precision import dtype_name
from besa.errors import BesaError
from besa.models.quiet import model_explained, quiet, without_bars
from besa.models.source import Source, fingerprint
from besa.models.widths import narrow, widths_of
from besa.storage.entry import besa_entry
from besa.storage.formats.container import OF_VERSION_1, check_depth, header, settings
from besa.storage.weights import PACKED, STEM, WIDTHS, WeightFiles


def load_model(source: Source, dtype: str = "auto") -> PreTrainedModel:
    """The whole model on the CPU, in evaluation mode, without gradients.

    Args:
        source: from `locate`.
        dtype: ``auto`` (the checkpoint's; float32 for a dequantised .gguf), ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        BesaError: the model cannot be read, or its code is not trusted.
    """
    if source.folder and not source.gguf:
        WeightFiles(source.folder)  # its error messages are clearer than those of transformers
    config = None if source.gguf else read_config(source)
    opening = source.arguments
    if source.folder and not source.gguf and (packed := header(source.folder)) and packed.version == 1:
        opening["quantization_config"] = AutoQuantizationConfig.from_dict(settings(source.folder, packed.codes))
    with quiet(), model_explained(source.name), without_bars():
        model, loaded = _loader(config).from_pretrained(
            **opening,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=None if source.gguf else True,
            output_loading_info=True,
        )
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}  # buffers have no random numbers
    if missing := sorted(loaded["missing_keys"] & parameters):
        raise BesaError(
            f"{source.name} gives no numbers for {missing[0]}: its configuration does not fit its weights; get or "
            "make the checkpoint anew."
        )
    _keep_about(config, model)
    if source.gguf:
        model.hf_quantizer.remove_quantization_config(model)  # the weights are plain floats from here on
    elif compressor := getattr(getattr(model, "hf_quantizer", None), "compressor", None):
        with quiet(), model_explained(source.name), without_bars():
            compressor.decompress_model(model)  # else packed linears have no weight before their first forward pass
            remove_dispatch(model, onload_tensors=True)  # else weights stay on the CPU, wherever the model goes
    return model.eval().requires_grad_(False)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model.

    Raises:
        BesaError: the model has none, or it cannot be read.
    """
    with quiet(), model_explained(source.name):
        return AutoTokenizer.from_pretrained(**source.arguments)


def read_config(source: Source) -> PreTrainedConfig:
    """The model's configuration.

    Raises:
        BesaError: it cannot be read, is of no causal decoder, or names a weight file that besa does not read.
    """
    if source.folder is not None and source.gguf is None:
        check_depth(source.folder)
    with quiet(), model_explained(source.name):
        config = AutoConfig.from_pretrained(**source.arguments)
    check_decoder(source.name, config)
    named = getattr(config, "transformers_weights", None)
    if named and not widths_of(config):
        raise BesaError(
            f"The config.json of {source.name} names {named} as the weight file (transformers_weights): rename that "
            f"file to {STEM}.safetensors, and remove the key."
        )
    return config


def check_decoder(name: str, config: PreTrainedConfig) -> None:
    """Refuse a model that is no causal decoder.

    Args:
        name: of the model, for the error message.
        config: of the model.

    Raises:
        BesaError: the model is an encoder-decoder, has no attention, or is configured to return tuples.
    """
    kind = f"{name} is a {config.model_type} model"
    if config.is_encoder_decoder:
        raise BesaError(f"{kind}, an encoder-decoder: besa prunes causal decoders.")
    try:
        attention = hasattr(config.get_text_config(), "num_attention_heads")
    except RuntimeError:  # transformers gives no number where blocks differ in it
        attention = True
    if not attention:
        raise BesaError(f"{kind}, which has no attention (state-space or recurrent): besa prunes causal decoders.")
    if not config.return_dict:
        raise BesaError(f"{kind} whose configuration has return_dict: false, which its own code cannot run: remove it.")


def read_generation_config(source: Source, model: PreTrainedModel) -> GenerationConfig | None:
    """The sampling settings of the checkpoint, or else those of the model, None where there are none.

    Raises:
        BesaError: the file is damaged.
    """
    if source.folder is None or not (source.folder / GENERATION_CONFIG_NAME).is_file():
        return getattr(model, "generation_config", None)
    with quiet(), model_explained(source.name):
        return GenerationConfig.from_pretrained(source.folder)


def quantization_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of the quantiser that made the stored codes, packed or not; empty for weights without codes."""
    said = [getattr(part, "quantization_config", None) for part in (config, config.get_text_config())]
    said.append(besa_entry(vars(config)).get("quantization_config"))  # of a packed checkpoint, version 1
    first = next((each for each in said if each and isinstance(each, dict)), {})
    if first.get("quant_method") == WIDTHS:
        return {}
    return (first.get("codes") or {}) if first.get("quant_method") == PACKED else first


def is_quantized(config: PreTrainedConfig) -> bool:
    """Whether the weights are stored as codes of a quantiser."""
    return bool(quantization_of(config))


def refuse_quantized(source: Source, config: PreTrainedConfig) -> None:
    """Refuse to prune quantised weights.

    Raises:
        BesaError: the weights are stored as codes of a quantiser.
    """
    if is_quantized(config):
        raise BesaError(f"{source.name} is quantised: prune the model it was made from.")


def skeleton(source: Source, config: PreTrainedConfig) -> PreTrainedModel:
    """The model's modules in the dtype of `config` and in evaluation mode, with parameters on the meta device.

    Buffers are real. Mixtures of experts compute expert by expert, as plain matrix products that besa can observe.

    Raises:
        BesaError: transformers cannot build a causal language model from the configuration.
    """
    with quiet(), model_explained(source.name), init_empty_weights(include_buffers=False):
        model = _loader(config).from_config(
            config, dtype=config.dtype, trust_remote_code=source.trust_remote_code, experts_implementation="eager"
        )
        narrow(model, widths_of(config))
    model.tie_weights()  # again: replacing the parameters by those without memory has untied them
    _keep_about(config, model)
    return model.eval().requires_grad_(False)


def skeleton_like(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the same class and dtype in evaluation mode, parameters and buffers on the meta device.

    Raises:
        BesaError: the class cannot be built from the configuration.
    """
    with quiet(), model_explained(type(model).__name__), torch.device("meta"):
        like: PreTrainedModel = type(model)._from_config(config, dtype=model.dtype, experts_implementation="eager")
    return like.eval().requires_grad_(False)


def _loader(config: PreTrainedConfig | None) -> Any:
    """The class of transformers that builds the model: for causal language models, or else for those with images."""
    for loader in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        has_code = loader.__name__ in (getattr(config, "auto_map", None) or {})
        if has_code or type(config) in loader._model_mapping:
            return loader
    return AutoModelForCausalLM  # its error message is the right one


def _keep_about(config: PreTrainedConfig | None, model: PreTrainedModel) -> None:
    """Copy besa's entry from the configuration of a wrapper to that of the text decoder inside.

    The header of version 1 stays behind: what is saved of the model is of the newest version, or dense.
    """
    if config is not None and hasattr(config, "besa"):
        model.config.besa = {key: value for key, value in besa_entry(vars(config)).items() if key not in OF_VERSION_1}


def describe(model: PreTrainedModel, source: Source | None = None) -> dict[str, Any]:
    """Identity of a model for a run record; `source` is None for a model that the caller loaded."""
    return {
        "source": source.base if source else model.name_or_path,
        "gguf": source.gguf if source else None,
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": dtype_name(model.dtype),
        "revision": commit(model, source),
        "fingerprint": fingerprint(source) if source else None,
    }


def commit(model: PreTrainedModel, source: Source | None = None) -> str | None:
    """The commit that a model comes from, None where there is none; `source` as of `describe`."""
    return (source and source.revision) or getattr(model.config, "_commit_hash", None)
