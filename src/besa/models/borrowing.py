"""A model that the caller made: used as it has to be, and handed back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


@contextmanager
def borrowed(model: PreTrainedModel, device: torch.device | None = None) -> Iterator[None]:
    """While open, a model is in evaluation mode and none of its parameters takes a gradient.

    Afterwards the device, the mode of every module and `requires_grad` of every parameter are as they were. So are
    gradients, as none are made meanwhile. Values of weights that were pruned stay pruned.

    Args:
        model: of the caller.
        device: where to compute; by default where the model is.
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
            parameter.requires_grad_(True)
