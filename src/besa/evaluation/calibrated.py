"""Whether a model was calibrated on a text that it is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from besa.data.embedded import EMBEDDED
from besa.data.mixture import texts_of
from besa.errors import BesaError
from besa.record import RunRecord
from besa.storage.names import path_of


def calibrated_on(text: str, beginning: str, record: RunRecord) -> bool:
    """Whether a model was calibrated on documents of a text, in its last run or in one before.

    A file is known by its name and by what it begins with, as a record may have a path that begins in another folder.
    Where the record does not say how a text begins, its path decides.

    Args:
        text: as `read_documents` takes it.
        beginning: its first characters.
        record: of the run that pruned the model.
    """
    before = [{"source": source} for run in record.earlier for source in run.calibration]
    return any(_drawn_from(text, beginning, calibration) for calibration in (record.calibration, *before))


def _drawn_from(text: str, beginning: str, calibration: Mapping[str, Any]) -> bool:
    """Whether a calibration set was drawn from documents of a text."""
    parts = calibration.get("parts") or [calibration]
    beginnings = {str(part.get("source", "")): str(part.get("beginning", "")) for part in parts}
    sources: list[str] = []
    with suppress(BesaError):  # a text of a name that nobody can read any more
        sources = texts_of(str(calibration.get("source", "")))
    if not _is_file_name(text):
        return text in sources
    known = {source: begins for source, begins in beginnings.items() if begins and _is_file_name(source)}
    if any(Path(source).name == Path(text).name and _alike(begins, beginning) for source, begins in known.items()):
        return True
    return _placed(text) in {_placed(source) for source in sources if source not in known}


def _alike(one: str, other: str) -> bool:
    """Whether two texts begin alike; of one, only a line may be known."""
    first, second = sorted((one.strip(), other.strip()), key=len)
    return second.startswith(first)


def _is_file_name(text: str) -> bool:
    """Whether a text is no embedded one and no data set of the Hub."""
    return text not in EMBEDDED and not text.startswith("hf:")


def _placed(text: str) -> Path | str:
    """The whole path of a file; any other text as it is."""
    with suppress(OSError, ValueError):  # no file can have that name
        return path_of(text).resolve()
    return text
