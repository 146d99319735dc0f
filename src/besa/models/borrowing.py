"""A model of the caller: put into the state that besa needs, and restored afterwards; and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa.counting.precision import dtype_name
from besa.errors import BesaError


@contextmanager
def borrowed(model: PreTrainedModel, device: torch.device | None = None) -> Iterator[None]:
    """While open, a model is in evaluation mode and none of its parameters requires a gradient.

    On exit, the device, the mode of every module and `requires_grad` of every parameter are restored. Gradients do not
    change, because none are computed meanwhile. Pruned weights stay pruned.

    Args:
        model: of the caller.
        device: where to compute, by default the model's device.
    """
    home = model.device
    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        if device is not None and device != home:
            model.to(device)
        yield
    finally:
        if device is not None and device != home:
            model.to(home)
        for module in training:
            module.training = True
        for parameter in learning:
            with torch.inference_mode(parameter.is_inference()):  # torch sets such a tensor's only there
                parameter.requires_grad_(True)


def check_dtype_of_caller(model: PreTrainedModel, dtype: str) -> None:
    """Check that a loaded model, which keeps its dtype, has the one that is asked for.

    Raises:
        BesaError: it has another.
    """
    own = dtype_name(model.dtype)
    if dtype not in ("auto", own):
        raise BesaError(f"{type(model).__name__} is loaded in {own}: load it in {dtype}, or leave dtype out.")


def check_memory_of_caller(model: PreTrainedModel, *, offloaded: bool = False) -> None:
    """Check that the weights of a loaded model have memory.

    Args:
        model: of the caller.
        offloaded: allow those that accelerate brings for each call, but for the first, whose place is the model's.

    Raises:
        BesaError: one has none.
    """
    if offloaded and model.device.type != "meta" and any(hasattr(part, "_hf_hook") for part in model.modules()):
        return
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise BesaError(f"{name} of {type(model).__name__} has no memory (meta device): load the weights first.")


def tokenizer_of_caller(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer that came with a loaded model.

    Raises:
        BesaError: there is none, or it is no tokenizer of transformers.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise BesaError("A loaded model needs its tokenizer, one of transformers: pass tokenizer=.")
    return tokenizer
