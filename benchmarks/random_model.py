"""Llama-shaped checkpoints of random weights, written one block at a time: any size, without a download."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

from besa.quantization import MinMax
from besa.storage.formats import codes

TOKENIZER = Path(__file__).parents[1] / "tests" / "assets" / "tiny-llama"
SHAPES = {  # hidden size, feed-forward size, heads, key-value heads
    "135M": (576, 1536, 9, 3),
    "1B": (2048, 8192, 32, 8),
    "7B": (4096, 11008, 32, 32),
    "70B": (8192, 28672, 64, 8),
}


def config(shape: str, blocks: int, vocabulary: int = 32000) -> LlamaConfig:
    """The configuration of a Llama of that shape."""
    hidden, feed_forward, heads, kv_heads = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def write(folder: Path, settings: LlamaConfig, seed: int = 0, sparsity: float = 0.0) -> None:
    """Write a checkpoint of one shard a block, and one for the rest, into a new folder.

    That share of each linear of a block, its smallest weights, is zero.
    """
    folder.mkdir(parents=True)
    settings.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    places: dict[str, str] = {}
    shards = [dict(_rest(settings)), *(dict(_block(settings, block)) for block in range(settings.num_hidden_layers))]
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {key: _random(shape, generator) for key, shape in shapes.items()}
        for key in tensors if number > 1 and sparsity else ():
            tensors[key] = _pruned(tensors[key], sparsity)
        save_file(tensors, folder / name, {"format": "pt"})
        places |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, dtype=torch.bfloat16, generator=generator) * shape[1] ** -0.5


def _pruned(w_OI: Tensor, sparsity: float) -> Tensor:
    if w_OI.dim() == 1:
        return w_OI
    size = w_OI.float().abs().flatten()
    smallest = size.numpy().argpartition(zeros := round(sparsity * size.numel()))[:zeros]
    return w_OI.flatten().index_fill(0, torch.from_numpy(smallest), 0).view_as(w_OI)


def _rest(settings: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (settings.vocab_size, settings.hidden_size)
    yield "lm_head.weight", (settings.vocab_size, settings.hidden_size)
    yield "model.norm.weight", (settings.hidden_size,)


def _block(settings: LlamaConfig, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, feed_forward = settings.hidden_size, settings.intermediate_size
    keys = settings.num_key_value_heads * settings.head_dim
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (feed_forward, hidden),
        "mlp.up_proj": (feed_forward, hidden),
        "mlp.down_proj": (hidden, feed_forward),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for name, shape in shapes.items():
        yield f"model.layers.{index}.{name}.weight", shape


def quantized(folder: Path, out: Path, bits: int, group: int | None) -> None:
    """Write another checkpoint of that folder to `out`: the linears of its blocks as codes, zeros exact.

    Args:
        folder: that `write` filled.
        out: new folder.
        bits: of a code.
        group: columns that share a grid; None for whole rows.
    """
    settings = MinMax(bits=bits, group=group, clipping="none")
    shutil.copytree(folder, out)
    for path in sorted(out.glob("*.safetensors"))[1:]:  # the first holds embeddings and head
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(path).items():
            if tensor.dim() == 1:
                tensors[name] = tensor
            else:
                linear = name.removesuffix(".weight")
                coded = settings.clipping_of(linear, tensor).quantized(tensor.dtype).pruned(tensor != 0)
                tensors |= {f"{linear}.{key}": stored for key, stored in codes.tensors_of(coded).items()}
        save_file(tensors, path, {"format": "pt"})
    (out / "model.safetensors.index.json").unlink()
    files = {name: path.name for path in sorted(out.glob("*.safetensors")) for name in load_file(path)}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = codes.quantization_config(settings, ["lm_head"])
    (out / "config.json").write_text(json.dumps(config))
