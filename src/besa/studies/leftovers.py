"""What stopped commands have left in a folder of runs: whole or half pruned weights that no finished table needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

KEY = re.compile(r".+-seed\d+-[0-9a-f]{10}")  # as `Workspace.key` makes them
PARTIAL, PASSING = ".partial", ".passing"


def left_over(folder: Path) -> str | None:
    """A sentence on what is left, with sizes; None if nothing is.

    It stays, because the command that was stopped can go on with it. The caller has the folder to itself, and all its
    own runs are done.
    """
    found = [f"{path.name} ({_bytes(path) / 1e6:,.1f} MB)" for path in sorted(_unfinished(folder))]
    if not found:
        return None
    return (
        f"{folder} has what stopped commands left: {', '.join(found)}. The same commands go on with it; if nobody will "
        "give them, remove it."
    )


def drop_marks(folder: Path) -> None:
    """Remove marks of passing weights that are gone; the caller has the folder to itself."""
    for mark in folder.glob(f"*{PASSING}"):
        here = any(mark.with_suffix(ending).exists() for ending in ("", PARTIAL))
        if KEY.fullmatch(mark.stem) and not here and mark.is_file():
            mark.unlink()


def _unfinished(folder: Path) -> Iterator[Path]:
    """Journals of runs, and weights that were to go once they are evaluated."""
    for path in folder.iterdir():
        passes = path.suffix == PARTIAL or (folder / f"{path.name}{PASSING}").exists()
        if passes and KEY.fullmatch(path.name.removesuffix(PARTIAL)) and path.is_dir():
            yield path


def _bytes(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
