"""Experts are taken out of a decoder: of its files as they are read, or of a model in memory."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from besa.errors import BesaError
from besa.models.layout import Layout
from besa.models.mixtures import Fewer
from besa.storage.selected import SelectedFiles, Selection
from besa.storage.weights import WeightFiles

Kept = Mapping[str, Sequence[int]]  # places of the experts that stay, in order, by name of the mixture


def selected(files: WeightFiles, layout: Layout, fewer: Fewer, kept: Kept) -> SelectedFiles:
    """The files of a decoder as if it had been saved with the experts `kept`, which are counted from 0 again.

    Multi-token-prediction (MTP) layers are left out: they have experts too, but their routers were not observed.

    Args:
        files: of the decoder with all experts.
        layout: of these files.
        fewer: the shapes.
        kept: experts that stay.

    Raises:
        BesaError: the files have experts in a form that besa does not know.
    """
    merged: dict[str, set[str]] = {}  # names in the files by the tensor of the model that they are parts of
    places = {stored: layout.place(stored) for stored in files.names}
    for stored, (name, is_part) in places.items():
        if is_part:
            merged.setdefault(name, set()).add(stored)
    shapes = dict(files.shapes())
    selections = {}
    for stored, (name, is_part) in places.items():
        if stored in layout.further:
            continue
        if name not in fewer.axes:
            selections[stored] = Selection(stored)
            continue
        stay = tuple(kept[fewer.of(name)])
        listed = _listed(stored, merged[name], fewer.mixtures.experts) if is_part else None
        if listed is not None:
            before, number, after = listed
            if number in stay:
                selections[f"{before}{stay.index(number)}{after}"] = Selection(stored)
            continue
        axis = fewer.axes[name]
        if shapes[stored][axis : axis + 1] != (fewer.mixtures.experts,):
            raise BesaError(
                f"{stored} holds experts in a layout that besa does not know: save the model once with transformers' "
                "save_pretrained, and prune that."
            )
        selections[stored] = Selection(stored, axis, stay)
    return SelectedFiles(files, selections)


def _listed(stored: str, others: Collection[str], experts: int) -> tuple[str, int, str] | None:
    """What is before the number of an expert in a name, the number, and what is after it; None for a stack of experts.

    Args:
        stored: name in the files.
        others: names of all tensors that are parts of the same one.
        experts: their number.
    """
    for found in re.finditer(r"(?<=\.)\d+(?=\.)", stored):
        before, after = stored[: found.start()], stored[found.end() :]
        if all(f"{before}{number}{after}" in others for number in range(experts)):
            return before, int(found[0]), after
    return None


def lent(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model: its modules are new, its tensors are those of the original."""
    memo: dict[int, Tensor] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(model, memo)


@torch.no_grad()
def take_out(model: PreTrainedModel, fewer: Fewer, kept: Kept) -> None:
    """Leave only the experts `kept` in a model, in place; parameters stay the same objects."""
    experts, smaller = fewer.mixtures.experts, dict(fewer.model.named_modules())
    for path, module in model.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if (axis := fewer.axes.get(full := f"{path}.{name}")) is not None:
                stay = torch.tensor(kept[fewer.of(full)], device=tensor.device)
                tensor.data = tensor.index_select(axis, stay)
        for key, value in vars(smaller[path]).items():
            if value == fewer.kept and type(value) is int and vars(module).get(key) == experts:
                setattr(module, key, value)
    text = model.config.get_text_config()
    for key, value in fewer.settings.items():
        setattr(text, key, value)
