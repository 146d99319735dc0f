"""Sizes of a model's text decoder that configurations of all families have."""

from __future__ import annotations

from transformers import PreTrainedModel


def channels(model: PreTrainedModel) -> int:
    """Channels of the residual stream."""
    return int(model.config.get_text_config().hidden_size)


def vocabulary(model: PreTrainedModel) -> int:
    """Tokens that the model knows, and so logits of one token."""
    return int(model.config.get_text_config().vocab_size)
