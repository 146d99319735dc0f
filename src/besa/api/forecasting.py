"""`besa.plan`: what a run will take, from the configuration of its model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from pydantic import InstanceOf

from besa.api.choosing import check_coded, chosen, default_batch
from besa.checkpoint.rewriting import folder_of
from besa.counting.budget import enough_for
from besa.data.arguments import Bytes, Count, Dtype, Length, Ranks, Samples, checked
from besa.data.documents import check_there, first_document
from besa.data.mixture import MIX, OWN, parts_of, texts_of
from besa.errors import BesaError
from besa.methods.recipe import Recipe
from besa.models.finding import find_blocks
from besa.models.limits import positions
from besa.models.loading import read_config, refuse_quantized, skeleton
from besa.models.mixtures import changed
from besa.models.source import Source, check_apart, locate, weight_paths
from besa.planning import Outline, Plan, work_out
from besa.pruning import smaller
from besa.record import RECORD_NAME, RunRecord
from besa.storage.formats.container import refuse_packed
from besa.storage.names import nearest, path_of
from besa.storage.writing import check_absent
from besa.system.devices import named_device
from besa.system.ranks import together


@checked
def plan(
    model: str | Path,
    recipe: InstanceOf[Recipe] | str | Path = "besa",
    *,
    out: str | Path | None = None,
    sparsity: float | None = None,
    calibration: str = MIX,
    samples: Samples = 128,
    seqlen: Length | None = None,
    device: str | torch.device = "auto",
    dtype: Dtype = "auto",
    batch: Count | None = None,
    activation_budget: Bytes | None = None,
    dequantized: bool = False,
    ranks: Ranks = 1,
    trust_remote_code: bool = False,
) -> Plan:
    """Estimate from the model's configuration what `compress` will take.

    Args:
        model: Hugging Face id, of which no weights are downloaded; local folder, of which a config.json is enough;
            .gguf file, or ``smollm2`` (embedded), which a run loads whole.
        recipe: as in `compress`.
        out: as in `compress`; None for somewhere in the working folder.
        sparsity: as in `compress`.
        calibration: as in `compress`; what the model writes takes passes and memory, and tokenising a file memory.
        samples: as in `compress`.
        seqlen: as in `compress`.
        device: as in `compress`; this machine need not have it.
        dtype: as in `compress`.
        batch: as in `compress`.
        activation_budget: as in `compress`; each rank has so much.
        dequantized: as in `compress`.
        ranks: processes that torchrun would start on this machine, one for each device.
        trust_remote_code: as in `compress`.

    Raises:
        BesaError: the configuration cannot be read or is of no decoder that besa can prune, a text is not there, `out`
            exists, is below a file or lies in the model's folder, or an argument is not used.
    """
    device, folder = named_device(device), Path() if out is None else path_of(out)
    recipe = chosen(recipe, sparsity)
    check_coded(dequantized, recipe)
    if not (place := nearest(folder)).is_dir():
        raise BesaError(f"{folder} cannot be written: {place} is no folder.")
    if out is not None:
        check_absent(folder)
        check_apart(model, folder)
    for text in texts_of(calibration):
        check_there(text)
    source = locate(model, trust_remote_code=trust_remote_code).local(weights=False)
    if not source.gguf:
        refuse_packed(folder_of(source), source.name)
    config = read_config(source)
    refuse_quantized(source, config)
    config.dtype = getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32
    empty = skeleton(source, config)
    room = positions(empty)
    seqlen = room.usual if seqlen is None else seqlen
    room.checked(seqlen, "--seqlen")
    with together(0, ranks):
        batch = batch or default_batch(samples, seqlen, device)
    recipe = recipe.settled(ranks, samples, {})
    fewer = smaller(empty, find_blocks(empty), recipe)
    if fewer is not None:
        empty = skeleton(source, changed(config, fewer.settings))
    plan = work_out(
        Outline(
            source.name,
            empty,
            find_blocks(empty),
            recipe,
            samples=samples,
            seqlen=seqlen,
            batch=min(samples, batch),
            device=device,
            activation_budget=activation_budget,
            folder=folder,
            dequantized=dequantized,
            fewer=fewer,
            ranks=ranks,
            file=sum(path.stat().st_size for path in weight_paths(source)) if source.gguf else None,
            own=float(sum(part.share for part in parts_of(calibration) if part.source == OWN)),
            document=_longest(texts_of(calibration)),
        )
    )
    return plan.model_copy(update={"warnings": [*plan.warnings, *_too_many_zeros(source, plan)]})


def _too_many_zeros(source: Source, plan: Plan) -> list[str]:
    """A sentence if an earlier run left more zeros than the plan asks for: no weights are read that would tell them."""
    before = None if source.gguf else RunRecord.known(folder_of(source))
    if before is None or before.weights != plan.prunable_weights or before.zeros <= plan.zeros:
        return []
    share = enough_for(before.zeros, before.weights)
    return [
        f"By its {RECORD_NAME}, {source.name} has {before.zeros:,} zeros already, so `besa prune` refuses the "
        f"{plan.zeros:,} that are planned: ask for a sparsity of at least {share}."
    ]


def _longest(texts: Sequence[str]) -> int:
    """Characters of the longest first document, as far as files of this machine tell it.

    Raises:
        BesaError: a file cannot be read.
    """
    with suppress(OSError, ValueError):  # a path that cannot be looked up; whoever reads it says so
        return max(map(first_document, texts), default=0)
    return 0
