"""What Ctrl-C leaves behind, in a sentence, where the work itself has not begun and cannot say it."""

from __future__ import annotations

from pathlib import Path

from besa.storage.names import partial_folder
from besa.storage.writing import LOCK

_begun: list[Path] = []  # folders that the command writes


def begin() -> None:
    """Forget what earlier commands of this process have told."""
    _begun.clear()


def writes(out: Path) -> None:
    """Tell, before anything is imported, that the command keeps finished blocks until this folder is complete."""
    _begun.append(out)


def sentence() -> str:
    """What was kept, and how to go on."""
    for out in _begun:
        if (partial_folder(out) / LOCK).exists():
            return f"interrupted; what was finished before is kept in {partial_folder(out)}: go on with --resume."
    return "interrupted; unfinished work was not kept."
