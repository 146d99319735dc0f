"""Models whose blocks differ in width, loaded by transformers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from besa.models.widths import settings, widths_of
from besa.runtime.saving import saving
from besa.storage.weights import WIDTHS_STEM


def finish(model: PreTrainedModel) -> PreTrainedModel:
    """Make the model an ordinary one, except that `save_pretrained` also writes its widths."""
    if hasattr(model.config, "transformers_weights"):
        del model.config.transformers_weights  # in a saved config.json it would lead programs without besa to the file
    model.is_quantized = False  # so that it may be moved, cast and trained as any other
    model.save_pretrained = partial(save_pretrained, model)  # which pickle can write
    return model


def save_pretrained(model: PreTrainedModel, save_directory: str | Path, **options: Any) -> None:
    """`save_pretrained` of such a model.

    Args:
        model: as `finish` returned it.
        save_directory: folder to fill.
        options: as of transformers' method.

    Raises:
        BesaError: as `saving`.
    """
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers saves the adapters alone
        type(model).save_pretrained(model, save_directory, **options)
        return
    if not options.pop("is_main_process", True):
        return
    with saving(model, Path(save_directory), WIDTHS_STEM, options) as (made, config):
        config |= settings(widths_of(model.config), not (made / f"{WIDTHS_STEM}.safetensors").is_file())
