"""Attention of packed models: while they decode on the CPU, besa's kernel computes it (`besa.kernels.attention`).

transformers looks attention up in a table, by name. besa replaces the function for "sdpa". The new one differs from
transformers' own only for modules of packed models, and only for one new token to each sequence. So a family that has
an attention of its own keeps it, and so does a model for which the user chose another one. A function that the user
put into the table stays.

Shape suffixes: N sequences, H heads, K KV heads, T tokens, S tokens that are attended to, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from besa.kernels import attention
from besa.runtime.derivatives import wanted
from besa.runtime.tracing import tracing

SDPA = "sdpa"
MARK = "_besa_attends"  # attribute of modules, which copies of them keep


def speed_up(model: nn.Module) -> None:
    """Let the modules of a model attend by besa's kernel where it can."""
    if ALL_ATTENTION_FUNCTIONS[SDPA] is sdpa_attention_forward:
        AttentionInterface.register(SDPA, attended)
    for module in model.modules():
        vars(module)[MARK] = True


def restore(model: nn.Module) -> None:
    """Undo `speed_up` for a model."""
    for module in model.modules():
        vars(module).pop(MARK, None)


def chosen() -> bool:
    """Whether models whose attention is "sdpa" get besa's function."""
    return ALL_ATTENTION_FUNCTIONS[SDPA] is attended


def attended(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention (N, T, H, D), with the arguments of transformers' function for "sdpa", as families name some of them.

    Args:
        module: the attention module.
        query: (N, H, T, D).
        key: (N, K, S, D), of S tokens so far.
        value: (N, K, S, D).
        attention_mask: (N, 1, T, S), true where a token is seen, or numbers to add; None if all before it are.
        dropout: share of the products that are left out.
        scaling: factor of the products, by default 1/√D.
        options: whatever else transformers' function takes.
    """
    tensors = (query, key, value)
    if (
        not tracing()
        and MARK in vars(module)
        and dropout == 0
        and not torch.is_autocast_enabled("cpu")
        and not wanted(*tensors)
        and options.get("position_bias") is None
        and not options.get("output_attentions")
        and attention.serves(*tensors, attention_mask)
    ):
        scale = query.size(3) ** -0.5 if scaling is None else scaling
        return attention.attend(*tensors, attention_mask, scale), None
    usual: tuple[Tensor, None] = sdpa_attention_forward(
        module, *tensors, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return usual
