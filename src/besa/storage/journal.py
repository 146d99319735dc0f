"""The journal of a run: it keeps every finished block, so that an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from besa.errors import BesaError, Interrupted
from besa.record import BlockRecord, DistillingRecord, MixtureRecord
from besa.storage.beside import Beside
from besa.storage.names import partial_folder
from besa.storage.tensors import save_tensors
from besa.storage.writing import LOCK, check_absent, claimed, explained, write_file

FORMAT = 2
IDENTITY = "run.json"
ORIGINS = "origins"  # key in it of what may differ when a run goes on, of each process that worked on it
DIGESTS = ("fingerprint", "sha256")  # keys of digests, of a model and of tokens
NAMES = ("source", "parts")  # keys beside them of where it came from
SPENT = "spent.json"
TARGETS = "targets.json"
MIXTURES = "mixtures.json"
GRADIENTS = "gradients.safetensors"
MEASURED = (TARGETS, MIXTURES, GRADIENTS)
DISTILLED = "distilled.json"
REST = "distilled-rest.safetensors"


class Journal:
    """Finished blocks in a folder; see `journal_for`.

    Each block has two files: its tensors, then its record with their digest. Both are written under another name and
    renamed. A block is done if both files exist and agree. A thread writes them, while the next block is pruned.

    Attributes:
        folder: of the journal.
        restored: number of blocks that this run took from the journal.
        earlier: seconds of interrupted processes that worked on the run, as far as they were kept.
        finished: whether the result is where it belongs, so that the journal can go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.restored = 0
        self.finished = False
        self.earlier, self._began = 0.0, time.perf_counter()
        self._writer = Beside()
        self._writing: Future[None] | None = None

    def begin(self, identity: Mapping[str, Any], origin: Mapping[str, Any]) -> list[str]:
        """Write the identity of the run, or check that the journal has the same one; `seconds` count from here on.

        The origin of every process that went on with the run is kept.

        Args:
            identity: everything that decides the result (recipe, model, data, …), in JSON types.
            origin: versions, machine and ranks, which decide its last digits, likewise.

        Returns:
            In words, how other processes differed that made parts of the run, in each part of their origin. Journals of
            before say nothing of ranks.

        Raises:
            BesaError: the journal belongs to another run, or is damaged.
        """
        current, begun = json.loads(json.dumps({"format": FORMAT, **identity, ORIGINS: [origin]})), self.begun
        self.earlier, self._began = self._spent(), time.perf_counter()
        if begun is None:
            write_file(self.folder / IDENTITY, json.dumps(current, indent=2))
            return []
        before, (now,) = begun.pop(ORIGINS, []), current.pop(ORIGINS)
        difference = _difference(begun, current)
        if difference:
            raise BesaError(
                f"{self.folder} belongs to a run with {difference}: use the same settings again, or remove the folder "
                "to start anew."
            )
        if now not in before:
            write_file(self.folder / IDENTITY, json.dumps({**begun, ORIGINS: [*before, now]}, indent=2))
        differences = (_difference(other[key], now[key], key) for other in before for key in now if key in other)
        return list(dict.fromkeys(words for words in differences if words))

    @property
    def seconds(self) -> float:
        """Seconds of this process since it began, and those of the interrupted ones before it."""
        return self.earlier + time.perf_counter() - self._began

    def _spent(self) -> float:
        """The seconds of earlier runs; none if the file is damaged."""
        try:
            return float(json.loads((self.folder / SPENT).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return 0.0

    def note_time(self) -> None:
        """Keep the seconds so far, for a run that goes on."""
        write_file(self.folder / SPENT, json.dumps(self.seconds))

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
        """Start writing a finished block; its tensors must not change any more.

        Args:
            tensors: all tensors of the block, named as in the checkpoint's files.
            record: of the block.

        Raises:
            BesaError: the disk is full, so that the block before this one could not be written.
        """
        self.settle()
        self._writing = self._writer.submit(self._write, tensors, record)

    def settle(self) -> None:
        """Wait until every block is written.

        Raises:
            BesaError: the disk is full.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, tensors: Mapping[str, Tensor], record: BlockRecord) -> None:
        path = self.path(record.index)
        save_tensors(path, tensors)
        entry = {"sha256": _sha256([path], record), "record": record.model_dump(mode="json")}
        write_file(path.with_suffix(".json"), json.dumps(entry))
        self.note_time()

    def record(self, index: int) -> BlockRecord | None:
        """The record of a block; None if it is not done or one of its files is damaged."""
        path = self.path(index)
        try:
            entry = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            record = BlockRecord.model_validate(entry["record"])
            if record.index == index and entry["sha256"] == _sha256([path], record):
                return record
        except (OSError, ValueError, TypeError, KeyError, RecursionError, ValidationError):
            pass
        return None

    def tensors(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished block."""
        return load_file(self.path(index))

    def keep_distilled(
        self, blocks: Iterable[tuple[int, Mapping[str, Tensor]]], rest: Mapping[str, Tensor], record: DistillingRecord
    ) -> None:
        """Keep the distilled model, beside the pruned blocks from which distillation began.

        Args:
            blocks: index and all tensors of each block, named as in the checkpoint's files.
            rest: tensors outside the blocks that have changed, likewise.
            record: of the distilling.

        Raises:
            BesaError: the disk is full.
        """
        paths = []
        for index, tensors in blocks:
            paths.append(self._distilled_path(index))
            save_tensors(paths[-1], tensors)
        if rest:
            paths.append(self.folder / REST)
            save_tensors(paths[-1], rest)
        files = [path.name for path in paths]
        entry = {"sha256": _sha256(paths, record), "record": record.model_dump(mode="json"), "files": files}
        write_file(self.folder / DISTILLED, json.dumps(entry))
        self.note_time()

    @property
    def distilled(self) -> DistillingRecord | None:
        """The record that `keep_distilled` kept; None if there is none or one of its files is damaged."""
        try:
            entry = json.loads((self.folder / DISTILLED).read_text(encoding="utf-8"))
            record = DistillingRecord.model_validate(entry["record"])
            if entry["sha256"] == _sha256([self.folder / str(name) for name in entry["files"]], record):
                return record
        except (OSError, ValueError, TypeError, KeyError, RecursionError, ValidationError):
            pass
        return None

    def final_path(self, index: int) -> Path:
        """Path of a block's final tensors: distilled, if the run distils."""
        distilled = self._distilled_path(index)
        return distilled if (self.folder / DISTILLED).exists() and distilled.exists() else self.path(index)

    def final_rest(self) -> dict[str, Tensor]:
        """The tensors outside the blocks that the run has changed."""
        path = self.folder / REST
        return load_file(path) if (self.folder / DISTILLED).exists() and path.exists() else {}

    def _distilled_path(self, index: int) -> Path:
        return self.folder / f"distilled-{index:05}.safetensors"

    def keep_targets(self, targets: list[float]) -> None:
        """Keep the sparsity of each block that was measured on the dense model."""
        write_file(self.folder / TARGETS, json.dumps(targets))
        self.note_time()

    @property
    def targets(self) -> list[float] | None:
        """The list that `keep_targets` kept; None if there is none or it is damaged, so that it is measured again."""
        try:
            targets = json.loads((self.folder / TARGETS).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        numbers = isinstance(targets, list) and all(isinstance(target, float) for target in targets)
        return targets if numbers else None

    def keep_mixtures(self, mixtures: list[MixtureRecord]) -> None:
        """Keep which experts were dropped."""
        write_file(self.folder / MIXTURES, json.dumps([each.model_dump(mode="json") for each in mixtures]))
        self.note_time()

    @property
    def mixtures(self) -> list[MixtureRecord] | None:
        """The list that `keep_mixtures` kept; None if there is none or it is damaged, so that it is chosen again."""
        try:
            kept = json.loads((self.folder / MIXTURES).read_text(encoding="utf-8"))
            return [MixtureRecord.model_validate(each) for each in kept]
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def keep_gradients(self, squares: Mapping[str, Tensor]) -> None:
        """Keep the squared gradients of the dense model's loss, by full name of the matrix."""
        save_tensors(self.folder / GRADIENTS, squares)
        self.note_time()

    @property
    def gradients(self) -> dict[str, Tensor] | None:
        """What `keep_gradients` kept; None if there is nothing or it is damaged, so that it is measured again."""
        try:
            return load_file(self.folder / GRADIENTS)
        except (OSError, SafetensorError):
            return None

    @property
    def blocks(self) -> int:
        """Number of finished blocks, without checking their files."""
        return len(list(self.folder.glob("block-*.json")))

    @property
    def kept(self) -> str:
        """What a resumed run can use, as the subject and verb of a sentence; empty if there is nothing."""
        if self.blocks:
            return f"{_finished(self.blocks)} {'is' if self.blocks == 1 else 'are'}"
        return "what was measured is" if any((self.folder / name).exists() for name in MEASURED) else ""

    @property
    def assembly(self) -> Path:
        """The folder in which the checkpoint is assembled from the blocks and the rest of the model."""
        return self.folder / "checkpoint"

    def tidy(self) -> None:
        """Remove what an earlier run has left of its checkpoint and of files that it was writing; blocks stay."""
        shutil.rmtree(self.assembly, ignore_errors=True)
        for pattern in (".*.partial", "rest*.safetensors"):
            for path in self.folder.glob(pattern):
                path.unlink()

    def clear(self) -> None:
        """Remove everything that an earlier run has left."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    @property
    def bytes(self) -> int:
        """Size of the finished blocks on the disk, and of what distilling has added."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))


@contextmanager
def journal_for(out: Path, resume: bool) -> Iterator[Journal]:
    """While open, the journal of a run whose result is the folder `out`. No other process can open it.

    After an error, the journal stays if it has finished blocks or what was measured before them; else it is removed.

    Args:
        out: must not exist.
        resume: continue an earlier run; without one, start as usual.

    Raises:
        BesaError: `out` exists, another process is writing it, the folder of the journal is not besa's, or an earlier
            run left blocks and `resume` is not set.
        Interrupted: Ctrl-C when the journal had something to keep.
    """
    check_absent(out)
    journal = Journal(partial_folder(out))
    with claimed(journal.folder, out):
        if journal.blocks and not resume:
            raise BesaError(
                f"{journal.folder} holds {_finished(journal.blocks)} of an interrupted run: go on with --resume, or "
                "remove it."
            )
        with explained(out):
            if resume:
                journal.tidy()
            else:
                journal.clear()
        try:
            yield journal
            journal.settle()
        except KeyboardInterrupt:
            journal.settle()
            if journal.kept:
                raise Interrupted(
                    f"interrupted; {journal.kept} kept in {journal.folder}: go on with --resume."
                ) from None
            raise
        finally:
            with suppress(BesaError):  # of a full disk: either it ends the work already, or another error does
                journal.settle()
            if journal.finished or not journal.kept:
                shutil.rmtree(journal.folder, ignore_errors=True)


def _finished(blocks: int) -> str:
    """A number of finished blocks, in words."""
    return f"{blocks} finished block{'' if blocks == 1 else 's'}"


def _sha256(paths: Iterable[Path], record: BlockRecord | DistillingRecord) -> str:
    """The digest of tensors and their record."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    digest.update(record.model_dump_json().encode())
    return digest.hexdigest()


def _difference(begun: Any, current: Any, path: str = "") -> str | None:
    """The first difference between two trees of JSON, in words; None if they are equal.

    Where digests are equal, names do not matter: one file can be named in several ways.
    """
    if isinstance(begun, dict) and isinstance(current, dict):
        alike = any(begun.get(digest) == current.get(digest) is not None for digest in DIGESTS)
        keys = [key for key in dict.fromkeys([*begun, *current]) if not (alike and key in NAMES)]
        differences = (_difference(begun.get(key), current.get(key), f"{path}.{key}".lstrip(".")) for key in keys)
        return next((difference for difference in differences if difference), None)
    return None if begun == current else f"{path} = {begun!r}, not {current!r}"
