"""Digests of all files of a checkpoint: written into its record at the end, and compared with the files later."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel

from besa.checkpoint.checking import check_packed
from besa.data.arguments import checked
from besa.digests import sha256_of
from besa.errors import BesaError
from besa.models.hub import CARD
from besa.progress import Progress, silent
from besa.record import RECORD_NAME
from besa.storage.companion_names import TEMPLATES, is_read
from besa.storage.folders import check_regular
from besa.storage.formats.container import open_files
from besa.storage.names import path_of
from besa.storage.writing import write_file

FILES = "files"  # key of the record
BLANK = "0" * 64  # replaces the record's own digest in the text that is hashed
# Endings of weight files, in any framework's format.
WEIGHTS = (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".pt", ".pth", ".index.json")


class Verified(BaseModel):
    """A checkpoint that has not changed since it was written.

    Attributes:
        files: number of files that were compared with their digests.
        bytes: size of these files.
    """

    files: int
    bytes: int


def seal(folder: Path) -> None:
    """Write the sha256 of each file of a finished folder into its record, and those of shards into their index too.

    Only the card has none: it tells of measurements, and its owner may edit it. A folder without a record gets one. The
    record's own digest is that of its text with 64 zeros in the digest's place.

    Args:
        folder: to which only measurements are added afterwards.

    Raises:
        BesaError: the disk is full.
    """
    weights = list(folder.glob("*.safetensors"))
    with ThreadPoolExecutor() as threads:
        digests = dict(zip((path.name for path in weights), threads.map(sha256_of, weights), strict=True))
    for path in folder.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        shards = sorted(set(index["weight_map"].values()))
        index.setdefault("metadata", {})["sha256"] = {shard: digests[shard] for shard in shards}
        write_file(path, json.dumps(index, indent=2) + "\n")
    record = folder / RECORD_NAME
    content = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    content.pop(FILES, None)  # digests of the folder that this one was made from
    unsealed = (record, folder / CARD)
    names = sorted(_name(path, folder) for path in folder.rglob("*") if path.is_file() and path not in unsealed)
    content[FILES] = {name: digests.get(name) or sha256_of(folder / name) for name in names} | {RECORD_NAME: BLANK}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_file(record, hashlib.sha256(text.encode()).hexdigest().join(text.rsplit(BLANK, 1)))


@checked
def verify(folder: str | Path, *, progress: Progress = silent) -> Verified:
    """Compare a checkpoint of besa with the digests in its record; the contents of a packed one are checked too.

    Args:
        folder: that `prune`, `pack`, `unpack` or `shrink` wrote.
        progress: called with (bytes done, bytes in all, name of the file).

    Raises:
        BesaError: a file is missing or has changed, there are further weights or files that models are made of, or the
            folder has no digests; the message names the first such file.
    """
    folder = path_of(folder)
    if not folder.is_dir():
        raise BesaError(f"{folder} is no folder: give one that `besa prune`, `pack`, `unpack` or `shrink` wrote.")
    check_regular(folder)
    digests = digests_of(folder / RECORD_NAME)
    if not digests:
        raise BesaError(
            f"{folder} has no digests to verify, because an older besa or another tool wrote it: make it anew."
            if any(path.name == RECORD_NAME or is_read(path.name) for path in folder.iterdir())
            else f"{folder} holds no checkpoint of besa: give a folder that besa wrote."
        )
    _check_digest(folder, RECORD_NAME, digests)  # before its list is believed
    for name in digests:
        if not (folder / name).is_file():
            raise BesaError(f"{folder} lacks {name}, which was written with it: get the folder anew.")
    for path in sorted([*folder.iterdir(), *folder.glob(TEMPLATES)]):
        name = _name(path, folder)
        if name not in digests and (name.endswith(WEIGHTS) or is_read(name)):
            raise BesaError(f"{path} was not written with the other files: remove it, or get the folder anew.")
    sizes = {name: (folder / name).stat().st_size for name in digests}
    done = 0
    for name in digests:
        _check_digest(folder, name, digests)
        done += sizes[name]
        progress(done, sum(sizes.values()), name)
    check_packed(open_files(folder))
    return Verified(files=len(digests), bytes=done)


def _check_digest(folder: Path, name: str, digests: Mapping[str, str]) -> None:
    """Refuse a file that is not what it was.

    Raises:
        BesaError: its digest is another one.
    """
    path, digest = folder / name, digests[name]
    if digest != (_record_sha256(path, digest) if name == RECORD_NAME else sha256_of(path)):
        raise BesaError(f"{path} has changed since it was written (its sha256): get the folder anew.")


def check_weights(folder: Path) -> None:
    """Refuse weights that have changed since their record was written, before a new checkpoint is made from them.

    Raises:
        BesaError: the digest of a weight file is not the one in the record, or the record is damaged.
    """
    for name, digest in digests_of(folder / RECORD_NAME).items():
        path = folder / name
        if path.suffix == ".safetensors" and path.is_file() and digest != sha256_of(path):
            raise BesaError(
                f"{path} has changed since it was written (its sha256): get the folder anew, or remove its "
                f"{RECORD_NAME} if you changed the weights yourself."
            )


def digests_of(record: Path) -> dict[str, str]:
    """The digests in a record by name of the file, the record's own first; empty for a record without digests.

    Raises:
        BesaError: the record is damaged, or lists something else than digests of files in the folder.
    """
    try:
        content = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    except (OSError, ValueError, RecursionError):
        raise BesaError(f"{record} is damaged: get the folder anew.") from None
    if not isinstance(content, dict):
        raise BesaError(f"{record} is damaged: get the folder anew.")
    digests = content.get(FILES)
    if not digests:
        return {}
    if not isinstance(digests, dict) or RECORD_NAME not in digests or not all(map(_sound, digests, digests.values())):
        raise BesaError(f"{record} is damaged: it does not list digests of the files beside it; get the folder anew.")
    return {RECORD_NAME: digests.pop(RECORD_NAME), **digests}


def _sound(name: str, digest: Any) -> bool:
    """Whether a name is that of a file in the folder or below it, and a digest is a sha256."""
    path = PurePosixPath(name)
    inside = not path.is_absolute() and ".." not in path.parts
    possible = "\0" not in name and all(len(part) < 256 for part in path.parts)
    return inside and possible and isinstance(digest, str) and re.fullmatch(r"[0-9a-f]{64}", digest) is not None


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _record_sha256(record: Path, digest: str) -> str:
    """The sha256 of a record whose own digest is replaced by zeros."""
    before, _, after = record.read_bytes().rpartition(digest.encode())
    return hashlib.sha256(before + BLANK.encode() + after).hexdigest()
