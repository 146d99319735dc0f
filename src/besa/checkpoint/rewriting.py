"""Writing a checkpoint from another one: new weights part by part, and copies of the model's other files."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from besa.checkpoint.cards import write_card
from besa.checkpoint.companions import companions, pass_on
from besa.checkpoint.verification import check_weights, seal
from besa.checkpoint.writer import assemble
from besa.errors import BesaError
from besa.models.source import Source, check_apart, locate
from besa.progress import Progress
from besa.record import RECORD_NAME
from besa.storage.formats.container import ABOUT, settings
from besa.storage.tensors import save_tensors
from besa.storage.weights import SPARSE_STEM, WIDTHS_STEM


def local(model: str | Path, out: str | Path, progress: Progress, trust_remote_code: bool) -> Source:
    """The model's files in a folder.

    Args:
        model: as `locate` takes it.
        out: what will be made of it.
        progress: told about a download.
        trust_remote_code: as of `locate`.

    Raises:
        BesaError: the files cannot be fetched, are a .gguf file, or are links out of the folder; or `out` lies in it.
    """
    check_apart(model, out)
    source = locate(model, progress, trust_remote_code=trust_remote_code)
    if source.gguf:
        raise BesaError(f"{model} is a .gguf file, which has no pruned weights: give a folder that `besa prune` wrote.")
    source = source.local(progress)
    companions(folder_of(source))  # refuses links before the work
    return source


def folder_of(source: Source) -> Path:
    """The folder of a local source."""
    assert source.folder is not None
    return source.folder


def rewrite(
    source: Source, folder: Path, parts: Iterable[dict[str, Tensor]], config: dict[str, Any], stem: str
) -> None:
    """Fill a folder with a checkpoint of these parts, a card, and copies of another checkpoint's other files.

    Args:
        source: whose files are copied, the run record too, but no measurements.
        folder: to fill.
        parts: tensors by name; one part at a time is in memory.
        config: content of config.json; that of a packed checkpoint gets its header here.
        stem: beginning of the names of weight files, which says whether the parts are packed.

    Raises:
        BesaError: it cannot be written, or the source's weights have changed since its record was written.
    """
    check_weights(folder_of(source))
    packed = stem == SPARSE_STEM
    about = ABOUT if packed else None
    (folder / "parts").mkdir()
    written = []
    for number, tensors in enumerate(parts):
        written.append(folder / "parts" / f"{number:05}.safetensors")
        save_tensors(written[-1], tensors, about)
    assemble(folder, written, stem, about)
    shutil.rmtree(folder / "parts")
    if packed:
        config = config | {"quantization_config": settings(folder, config.get("quantization_config"))}
    if stem == WIDTHS_STEM:
        sharded = not (folder / f"{WIDTHS_STEM}.safetensors").is_file()
        config = config | {"quantization_config": config["quantization_config"] | {"sharded": sharded}}
    pass_on(folder_of(source), folder, config, also=[RECORD_NAME])
    write_card(folder, folder_of(source), (source.base, source.revision))
    seal(folder)


def size_of(paths: Iterable[Path]) -> int:
    """Bytes of these files together."""
    return sum(path.stat().st_size for path in paths)
