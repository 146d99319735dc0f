"""What besa had made of a model before it is pruned again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from besa.checkpoint.companions import read_config_json
from besa.models.streaming import Decoder
from besa.record import EarlierRun, RunRecord
from besa.storage.entry import besa_entry


def label(record: RunRecord) -> dict[str, Any]:
    """What besa's entry in the configuration of a model says of the run that pruned it."""
    return {"recipe": record.recipe["name"], "sparsity": record.sparsity}


def staying(decoder: Decoder, changed: Mapping[str, Tensor]) -> dict[str, Any]:
    """What stays true in besa's entry of config.json when a model is pruned again.

    Args:
        decoder: of the model.
        changed: tensors outside the blocks that the run has changed.
    """
    entry = _entry(decoder)
    rounded = not any(tensor.dim() > 1 for tensor in changed.values())  # the head and the embeddings are as they were
    return {key: entry[key] for key in ("head", "shrunk") if key in entry and (key != "head" or rounded)}


def earlier(decoder: Decoder) -> list[EarlierRun]:
    """The runs of besa that made a model what it is, the first one first; none of a model that is dense.

    Of a model in memory, only its configuration says something.

    Args:
        decoder: of the model, before it is pruned.
    """
    entry = _entry(decoder)
    record = RunRecord.known(decoder.folder) if decoder.folder is not None else None
    if record is not None:
        about = record.calibration
        run = {
            "created": record.created,
            "recipe": record.recipe.get("name"),
            "sparsity": record.sparsity,
            "seed": record.seed,
            "calibration": [part.get("source") or "tokens" for part in about.get("parts") or [about]],
        }
    else:
        run = {key: entry[key] for key in ("recipe", "sparsity") if key in entry}
    if not run and "shrunk" not in entry:
        return []
    try:
        last = EarlierRun.model_validate(run | {"shrunk": entry.get("shrunk", {})})
    except ValidationError:  # somebody else's entry
        return []
    return [*(record.earlier if record is not None else []), last]


def _entry(decoder: Decoder) -> Mapping[str, Any]:
    """besa's entry in the configuration of a model."""
    config = vars(decoder.model.config) if decoder.folder is None else read_config_json(decoder.folder)
    return besa_entry(config)
