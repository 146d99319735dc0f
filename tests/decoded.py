"""Packed models that decode, and how often kernels are called meanwhile."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

import besa
from besa.kernels import decoding as kernels
from besa.runtime import block_decoding, decoding
from tests.halved_models import halved

SIZE = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def packed(config: PretrainedConfig, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    besa.pack(halved(config, folder / "dense", dtype), folder / "packed")
    return besa.load(folder / "packed")


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many attention modules each call of a kernel does meanwhile, alone or in their blocks."""
    calls: list[int] = []

    def alone(self: kernels.Step, *given: Any, of: Callable[..., Tensor] = kernels.Step.__call__) -> Tensor:
        calls.append(1)
        return of(self, *given)

    def blocks(steps: list[kernels.Block], *given: Any, of: Callable[..., Tensor] = kernels.passed) -> Tensor:
        calls.append(len(steps))
        return of(steps, *given)

    with monkeypatch.context() as patch:
        patch.setattr(kernels.Step, "__call__", alone)
        patch.setattr(block_decoding, "passed", blocks)
        yield calls


def usual(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that attends as its family does."""
    other = copy.deepcopy(model)
    decoding.restore(other)
    block_decoding.restore(other)
    assert not any("forward" in vars(block.self_attn) for block in other.model.layers)
    return other


@torch.inference_mode()
def steps(model: PreTrainedModel, count: int, sequences: int = 1, **options: Any) -> list[Tensor]:
    """Logits of so many tokens, one after the other, after a prompt; and keys and values of all."""
    past = options.pop("past_key_values", None) or DynamicCache(config=model.config)
    tokens = torch.arange(5 * sequences).view(sequences, 5)
    found = []
    for _ in range(count):
        out = model(tokens, past_key_values=past, **options)
        found.append(out.logits[:, -1])
        tokens = out.logits[:, -1:].argmax(-1)
    return found + [part for layer in past.layers for part in (layer.keys, layer.values)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))
