"""The journal of a run: every block as it gets done, so that a run goes on where it stopped, whatever stopped it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from besa.errors import BesaError, Interrupted
from besa.record import BlockRecord
from besa.storage.writing import check_absent, claimed, save_tensors, write_file

FORMAT = 1
IDENTITY = "run.json"
TARGETS = "targets.json"


class Journal:
    """Finished blocks in a folder of their own; see `journal_for`.

    Each block is two files, written under another name and then renamed: its tensors, and after them its record with
    their digest. A block counts as done when both are there and agree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.restored = 0

    def begin(self, identity: Mapping[str, Any]) -> None:
        """State what is being done, or make sure that the journal is of the same.

        Args:
            identity: whatever decides the result: recipe, model, data, …; JSON types only.

        Raises:
            BesaError: the journal is of another run, or damaged.
        """
        path = self.folder / IDENTITY
        wanted = json.loads(json.dumps({"format": FORMAT, **identity}))
        if not path.exists():
            write_file(path, json.dumps(wanted, indent=2))
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            raise BesaError(f"{path} is damaged: remove {self.folder} and run without --resume.") from None
        difference = _difference(found, wanted)
        if difference:
            raise BesaError(
                f"{self.folder} was begun with {difference}: ask for the same again, or remove it to start anew."
            )

    def path(self, index: int) -> Path:
        """Where the tensors of a block are."""
        return self.folder / f"block-{index:05}.safetensors"

    def keep(self, tensors: Mapping[str, Tensor], record: BlockRecord) -> None:
        """Add a finished block.

        Args:
            tensors: all tensors of the block, named as in the checkpoint's files.
            record: of what was done.

        Raises:
            BesaError: the disk is full.
        """
        path = self.path(record.index)
        save_tensors(path, tensors)
        entry = {"sha256": _sha256(path, record), "record": record.model_dump(mode="json")}
        write_file(path.with_suffix(".json"), json.dumps(entry))

    def record(self, index: int) -> BlockRecord | None:
        """The record of a block, or None where it is not done or one of its files is damaged."""
        path = self.path(index)
        try:
            entry = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            record = BlockRecord.model_validate(entry["record"])
            if record.index == index and entry["sha256"] == _sha256(path, record):
                return record
        except (OSError, ValueError, TypeError, KeyError, RecursionError, ValidationError):
            pass
        return None

    def tensors(self, index: int) -> dict[str, Tensor]:
        """The tensors of a block that is done."""
        return load_file(self.path(index))

    def keep_targets(self, targets: list[float]) -> None:
        """Keep what was measured of the dense model before its first block was pruned."""
        write_file(self.folder / TARGETS, json.dumps(targets))

    @property
    def targets(self) -> list[float] | None:
        """What `keep_targets` kept, None where there is nothing or it is damaged: it can be measured again."""
        try:
            targets = json.loads((self.folder / TARGETS).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        numbers = isinstance(targets, list) and all(isinstance(target, float) for target in targets)
        return targets if numbers else None

    @property
    def blocks(self) -> int:
        """How many blocks seem to be done."""
        return len(list(self.folder.glob("block-*.json")))

    @property
    def bytes(self) -> int:
        """What the finished blocks take on the disk."""
        return sum(path.stat().st_size for path in self.folder.glob("block-*.safetensors"))


def partial_folder(out: Path) -> Path:
    """Where a run towards `out` keeps what it has so far."""
    return out.with_name(f"{out.name}.partial")


@contextmanager
def journal_for(out: Path, resume: bool) -> Iterator[Journal]:
    """The journal of a run that is to end in the folder `out`; no other process can have it at the same time.

    What is left of a run that fails is kept when it has finished blocks, and removed when it has none.

    Args:
        out: must not exist.
        resume: go on with what an earlier run left; where there is nothing, this is a run like any other.

    Raises:
        BesaError: `out` exists, another process is at it, or an earlier run left blocks and `resume` is not set.
        Interrupted: Ctrl-C, after at least one finished block.
    """
    check_absent(out)
    journal = Journal(partial_folder(out))
    with claimed(journal.folder, out):
        if journal.blocks and not resume:
            raise BesaError(
                f"{journal.folder} holds {journal.blocks} finished blocks of an interrupted run: go on with --resume, "
                "or remove it."
            )
        try:
            yield journal
        except KeyboardInterrupt:
            if journal.blocks:
                raise Interrupted(
                    f"interrupted; {journal.blocks} finished blocks are kept in {journal.folder}: go on with --resume."
                ) from None
            raise
        finally:
            if not journal.blocks or out.exists():
                shutil.rmtree(journal.folder, ignore_errors=True)


def _sha256(path: Path, record: BlockRecord) -> str:
    """Of a block's tensors and of what is said about them."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(record.model_dump_json().encode())
    return digest.hexdigest()


def _difference(found: Any, wanted: Any, path: str = "") -> str | None:
    """Words for the first place in which two trees of JSON differ; None where they are equal."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = dict.fromkeys([*found, *wanted])
        places = (_difference(found.get(key), wanted.get(key), f"{path}.{key}".lstrip(".")) for key in keys)
        return next((place for place in places if place), None)
    return None if found == wanted else f"{path} = {found!r}, not {wanted!r}"
