"""A Llama of safetensors as a .gguf file in bfloat16, for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from besa.storage.weights import WeightFiles

KIND = "llama"


def write(folder: Path, out: Path, tokenizer: Path | None) -> None:
    """Write the model of a folder.

    Args:
        folder: of a Llama.
        out: file to write.
        tokenizer: .gguf file of a model with the same tokenizer; None for a model whose tokens mean nothing.
    """
    config, files = AutoConfig.from_pretrained(folder), WeightFiles(folder)
    writer = GGUFWriter(out, KIND)
    _settings(writer, config)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        _copy_tokenizer(writer, GGUFReader(tokenizer))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in files.read(files.names):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = _rotated(tensor, heads)
        _add(writer, names.get_name(name, try_suffixes=(".weight",)), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _settings(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def _rotated(w_OI: Tensor, heads: int) -> Tensor:
    """The weight of queries or keys with its rows in llama.cpp's order.

    Rotary embeddings turn pairs of numbers of a head: transformers pairs the first half with the second, llama.cpp
    neighbours.
    """
    return w_OI.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(w_OI.shape)


def _add(writer: GGUFWriter, name: str, tensor: Tensor) -> None:
    """Matrices in bfloat16, vectors in float32."""
    if tensor.dim() == 1:
        writer.add_tensor(name, tensor.float().numpy())
    else:
        data = tensor.bfloat16().contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType.BF16)


def _copy_tokenizer(writer: GGUFWriter, reader: GGUFReader) -> None:
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            inner: Any = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
