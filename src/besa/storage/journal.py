"""The journal of a run: it keeps every finished block, so that an interrupted run can be resumed."""

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
    """Finished blocks in a folder; see `journal_for`.

    Each block has two files: its tensors, then its record with their digest. Both are written under another name and
    renamed. A block is done if both files exist and agree.

    Attributes:
        folder: of the journal.
        restored: number of blocks that this run took from the journal.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.restored = 0

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Write the identity of the run, or check that the journal has the same.

        Args:
            identity: all that decides the result (recipe, model, data, …), in JSON types.

        Raises:
            BesaError: the journal belongs to another run, or is damaged.
        """
        current, begun = json.loads(json.dumps({"format": FORMAT, **identity})), self.begun
        if begun is None:
            write_file(self.folder / IDENTITY, json.dumps(current, indent=2))
            return
        difference = _difference(begun, current)
        if difference:
            raise BesaError(
                f"{self.folder} was begun with {difference}: ask for the same again, or remove it to start anew."
            )

    @property
    def begun(self) -> dict[str, Any] | None:
        """What `begin` wrote; None if the run has not begun.

        Raises:
            BesaError: the journal is damaged.
        """
        path = self.folder / IDENTITY
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):
            begun = None
        if not isinstance(begun, dict):
            raise BesaError(f"{path} is damaged: remove {self.folder} and run without --resume.")
        return begun

    def path(self, index: int) -> Path:
        """Path of the tensors of a block."""
        return self.folder / f"block-{index:05}.safetensors"

    def keep(self, tensors: Mapping[str, Tensor], record: BlockRecord) -> None:
        """Add a finished block.

        Args:
            tensors: all tensors of the block, named as in the checkpoint's files.
            record: of the block.

        Raises:
            BesaError: the disk is full.
        """
        path = self.path(record.index)
        save_tensors(path, tensors)
        entry = {"sha256": _sha256(path, record), "record": record.model_dump(mode="json")}
        write_file(path.with_suffix(".json"), json.dumps(entry))

    def record(self, index: int) -> BlockRecord | None:
        """The record of a block; None if it is not done or one of its files is damaged."""
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
        """The tensors of a finished block."""
        return load_file(self.path(index))

    def keep_targets(self, targets: list[float]) -> None:
        """Keep the sparsity of each block that was measured on the dense model."""
        write_file(self.folder / TARGETS, json.dumps(targets))

    @property
    def targets(self) -> list[float] | None:
        """The list that `keep_targets` kept; None if there is none or it is damaged, so that it is measured again."""
        try:
            targets = json.loads((self.folder / TARGETS).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        numbers = isinstance(targets, list) and all(isinstance(target, float) for target in targets)
        return targets if numbers else None

    @property
    def blocks(self) -> int:
        """Number of finished blocks, without checking their files."""
        return len(list(self.folder.glob("block-*.json")))

    @property
    def bytes(self) -> int:
        """Size of the finished blocks on the disk."""
        return sum(path.stat().st_size for path in self.folder.glob("block-*.safetensors"))


def partial_folder(out: Path) -> Path:
    """The folder in which a run keeps its finished blocks until `out` is complete."""
    return out.with_name(f"{out.name}.partial")


@contextmanager
def journal_for(out: Path, resume: bool) -> Iterator[Journal]:
    """While open, the journal of a run whose result is the folder `out`. No other process can open it.

    After an error, the journal stays if it has finished blocks; else it is removed.

    Args:
        out: must not exist.
        resume: continue an earlier run; without one, start as usual.

    Raises:
        BesaError: `out` exists, another process is writing it, or an earlier run left blocks and `resume` is not set.
        Interrupted: Ctrl-C after at least one finished block.
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
    """The digest of a block's tensors and record."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(record.model_dump_json().encode())
    return digest.hexdigest()


def _difference(begun: Any, current: Any, path: str = "") -> str | None:
    """The first difference between two trees of JSON, in words; None if they are equal."""
    if isinstance(begun, dict) and isinstance(current, dict):
        keys = dict.fromkeys([*begun, *current])
        differences = (_difference(begun.get(key), current.get(key), f"{path}.{key}".lstrip(".")) for key in keys)
        return next((difference for difference in differences if difference), None)
    return None if begun == current else f"{path} = {begun!r}, not {current!r}"
