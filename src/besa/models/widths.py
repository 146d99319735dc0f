"""Widths by block: a model whose blocks keep different numbers of feed-forward channels and heads.

No configuration of transformers describes such a model. Its config.json has the widths that all blocks had, and says
under `quantization_config` what each block keeps, so that besa is asked before the weights are loaded. Without besa,
transformers looks for a weight file whose name is the sentence `MISSING`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from besa.errors import BesaError
from besa.models.couplings import CALLED, Kind, couplings, take_out
from besa.models.finding import find_blocks
from besa.storage.weights import WIDTHS

VERSION = 1
MISSING = "the blocks of this model differ in width, so loading it needs besa (pip install besa-llm).safetensors"

Widths = Mapping[Kind, Sequence[int]]


def settings(widths: Widths, sharded: bool) -> dict[str, Any]:
    """The keys of config.json that say what each block keeps.

    Args:
        widths: structures of every block, by kind.
        sharded: whether the weights are in several files.
    """
    said = {"quant_method": WIDTHS, "version": VERSION, "sharded": sharded}
    return {
        "quantization_config": said | {kind: list(each) for kind, each in widths.items()},
        "transformers_weights": MISSING,
    }


def widths_of(config: PreTrainedConfig) -> Widths:
    """Structures of every block, by kind, as a configuration says; empty if all blocks have the same.

    Raises:
        BesaError: a later besa wrote it.
    """
    said = getattr(config, "quantization_config", None)
    if said is not None and not isinstance(said, dict):
        said = said.to_dict()
    if not said or said.get("quant_method") != WIDTHS:
        return {}
    if said.get("version") != VERSION:
        raise BesaError(
            f"Its widths by block are of version {said.get('version')!r}, and this besa reads version {VERSION}: use "
            "the besa that wrote it."
        )
    return {kind: said[kind] for kind in get_args(Kind) if kind in said}


def refuse(name: str, config: PreTrainedConfig) -> None:
    """Refuse a model whose blocks have widths of their own, where it would have to be written again.

    Raises:
        BesaError: it is one.
    """
    if widths_of(config):
        raise BesaError(
            f"The blocks of {name} have widths of their own, which cannot be written again: take the folder that it "
            "was shrunk from."
        )


def narrow(model: PreTrainedModel, widths: Widths) -> None:
    """Make the blocks of a model as narrow as `widths` says, in place: their first structures stay.

    Args:
        model: of the configuration, on the meta device or with any weights.
        widths: as `widths_of` returns it.

    Raises:
        BesaError: the widths are not those of such a model.
    """
    blocks = find_blocks(model) if widths else []
    for kind, numbers in widths.items():
        if not isinstance(numbers, list | tuple) or len(numbers) != len(blocks):
            raise BesaError(
                f"Its config.json does not say how many {CALLED[kind]} each of its blocks has: it is damaged."
            )
    for block in blocks:
        known = {coupling.kind: coupling for coupling in couplings(block)}
        for kind, numbers in widths.items():
            number, coupling = numbers[block.index], known.get(kind)
            if coupling is None or not isinstance(number, int) or not 0 < number <= coupling.structures:
                raise BesaError(f"{block.name} cannot have {number!r} {CALLED[kind]}: its config.json is damaged.")
            device = next(block.module.parameters()).device
            take_out(block, coupling, torch.arange(number, device=device))
