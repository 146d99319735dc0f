"""A checkpoint made of another one on the disk: its weights part by part, and all else that belongs to the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from besa.checkpoint.files import save_tensors, write_file
from besa.checkpoint.formats.container import ABOUT
from besa.checkpoint.verification import seal
from besa.checkpoint.writer import assemble
from besa.errors import BesaError
from besa.models.files import SPARSE_STEM
from besa.models.loading import NEEDED, Source, locate
from besa.progress import Progress
from besa.record import RECORD_NAME

OWN = "besa_*.json"  # what besa wrote beside the weights; measurements in it are of these very files


def local(model: str | Path, progress: Progress) -> Source:
    """The model's files in a folder.

    Raises:
        BesaError: they cannot be had, or are a .gguf file.
    """
    source = locate(model, progress)
    if source.gguf:
        raise BesaError(f"{model} is a .gguf file, of which nothing is pruned: give a folder that `besa prune` wrote.")
    return source.local()


def folder_of(source: Source) -> Path:
    """Where the files of a local source are."""
    assert source.folder is not None
    return source.folder


def config_of(source: Source) -> dict[str, Any]:
    """What stands in config.json."""
    config: dict[str, Any] = json.loads((folder_of(source) / "config.json").read_text(encoding="utf-8"))
    return config


def rewrite(
    source: Source, folder: Path, parts: Iterable[dict[str, Tensor]], config: dict[str, Any], stem: str
) -> None:
    """Fill a folder with a checkpoint of these parts, and with the tokenizer, the run record and the like of another.

    Args:
        source: whose files are copied, but for weights and measurements.
        folder: to fill.
        parts: tensors by name, of which one part at a time is in memory.
        config: what is to stand in config.json.
        stem: what the names of weight files begin with.

    Raises:
        BesaError: it cannot be written.
    """
    about = ABOUT if stem == SPARSE_STEM else None
    (folder / "parts").mkdir()
    written = []
    for number, tensors in enumerate(parts):
        written.append(folder / "parts" / f"{number:05}.safetensors")
        save_tensors(written[-1], tensors, about)
    assemble(folder, written, stem, about)
    shutil.rmtree(folder / "parts")
    for path in sorted(path for pattern in NEEDED for path in folder_of(source).glob(pattern)):
        weights = path.name.endswith((".safetensors", ".index.json"))
        if not weights and (path.name == RECORD_NAME or not path.match(OWN)):
            shutil.copyfile(path, folder / path.name)
    write_file(folder / "config.json", json.dumps(config, indent=2) + "\n")
    seal(folder)


def size_of(paths: Iterable[Path]) -> int:
    """Bytes of these files together."""
    return sum(path.stat().st_size for path in paths)
