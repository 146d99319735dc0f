"""What a caller hands over loaded: a model, which is given back as it was, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa.errors import BesaError


@contextmanager
def borrowed(model: PreTrainedModel, device: torch.device | None = None) -> Iterator[None]:
    """While open, a model computes as in evaluation, without dropout and gradients of its own.

    Its modes, its device, and what has gradients are as the caller left them afterwards.

    Args:
        model: whose modules may be in any mode.
        device: where it computes meanwhile, None where it is.
    """
    home, training = model.device, [module for module in model.modules() if module.training]
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.eval().requires_grad_(False)
    try:
        if device is not None:
            model.to(device)
        yield
    finally:
        for module in training:
            module.training = True
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in learning)
        if device is not None:
            model.to(home)


def tokenizer_of_caller(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer that came with a loaded model.

    Raises:
        BesaError: none did, or something else.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise BesaError("A loaded model needs its tokenizer, one of transformers: pass tokenizer=.")
    return tokenizer
