"""Snapshots of long work in the folder of its journal: one is always complete, whenever the process is killed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from besa.digests import sha256_of
from besa.storage.tensors import save_tensors
from besa.storage.writing import write_file

EVERY = 180.0  # seconds between two states
SHARE = 0.05  # of the time, which writing states takes at most


class Snapshots:
    """Snapshots of a position in the work and of tensors by group; one group at a time is in memory.

    Two states take turns. Each has a file for every group, then one with the position and the digests of the others.

    Args:
        folder: of the journal.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last = max((state for slot in (0, 1) if (state := self._read(slot))), key=_number, default=None)
        self._kept, self._took = time.monotonic(), 0.0

    @property
    def position(self) -> dict[str, Any] | None:
        """Position of the last complete state; None if there is none."""
        return self._last["position"] if self._last is not None else None

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Tensors of a group in the last complete state."""
        assert self._last is not None
        return load_file(self._path(_slot(self._last), self._last["groups"].index(group)))

    def keep(
        self, position: Mapping[str, Any], groups: Iterable[tuple[str, Mapping[str, Tensor]]], urgent: bool
    ) -> bool:
        """Keep a state, if some time has passed since the last one; whether it did.

        Args:
            position: in the work, in JSON types.
            groups: tensors by name of each group.
            urgent: keep it now, unless writing has just taken long.

        Raises:
            BesaError: the disk is full.
        """
        began = time.monotonic()
        if began - self._kept < max(self._took / SHARE, 0.0 if urgent else EVERY):
            return False
        number = _number(self._last) + 1 if self._last is not None else 0
        state: dict[str, Any] = {"number": number, "position": position, "groups": [], "sha256": []}
        for at, (group, tensors) in enumerate(groups):
            path = self._path(_slot(state), at)
            save_tensors(path, tensors)
            state["groups"].append(group)
            state["sha256"].append(sha256_of(path))
        write_file(self._index(_slot(state)), json.dumps(state))
        self._remove(1 - _slot(state))
        self._last = state
        self._kept = time.monotonic()
        self._took = self._kept - began
        return True

    def clear(self) -> None:
        """Remove all states."""
        self._last = None
        for slot in (0, 1):
            self._remove(slot)

    def _remove(self, slot: int) -> None:
        self._index(slot).unlink(missing_ok=True)
        for path in self._folder.glob(f"state-{slot}-*.safetensors"):
            path.unlink()

    def _index(self, slot: int) -> Path:
        return self._folder / f"state-{slot}.json"

    def _path(self, slot: int, at: int) -> Path:
        return self._folder / f"state-{slot}-{at:05}.safetensors"

    def _read(self, slot: int) -> dict[str, Any] | None:
        """A state; None if there is none or one of its files is damaged."""
        try:
            state: dict[str, Any] = json.loads(self._index(slot).read_text(encoding="utf-8"))
            paths = [self._path(slot, at) for at in range(len(state["groups"]))]
            whole = [sha256_of(path) for path in paths] == state["sha256"] and _slot(state) == slot
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None
        return state if whole and isinstance(state["position"], dict) else None


def _number(state: Mapping[str, Any]) -> int:
    number: int = state["number"]
    return number


def _slot(state: Mapping[str, Any]) -> int:
    return _number(state) % 2
