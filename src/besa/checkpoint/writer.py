"""Writing a checkpoint whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa.errors import BesaError
from besa.models.loading import quiet
from besa.record import RECORD_NAME, RunRecord

SHARD = "4GB"


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill under a temporary name, that becomes `out` when all went well and is removed when not.

    Open it before the long work: what could keep `out` from being written is found out now.

    Raises:
        BesaError: `out` exists, cannot be created, or the disk is full.
    """
    if out.exists():
        raise BesaError(f"{out} exists already: choose another name, or remove it first.")
    with explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        try:
            yield partial
            _open_to_others(partial)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def write_file(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all.

    Raises:
        BesaError: the file cannot be written.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def check_space(out: Path, size: int) -> None:
    """Refuse at once what cannot fit.

    Args:
        out: where a checkpoint will be written.
        size: its bytes.

    Raises:
        BesaError: the disk has fewer bytes free.
    """
    place = next(folder for folder in [out, *out.absolute().parents] if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < size:
        raise BesaError(
            f"{out} needs {size / 1e9:.2f} GB but only {free / 1e9:.2f} GB are free there: make room first."
        )


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, record: RunRecord) -> None:
    """Write weights (safetensors, dense with zeros), configuration, tokenizer and run record into `folder`.

    What comes out loads with plain ``from_pretrained``; the sparsity stands under a key of our own in config.json.
    """
    model.config.besa = {"recipe": record.recipe["name"], "sparsity": record.sparsity, "record": RECORD_NAME}
    record.write(folder / RECORD_NAME)
    with quiet():
        model.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write `path` into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or f"(os error {errno.ENOSPC})" in str(error):  # safetensors writes in Rust and has no errno
            raise BesaError(f"The disk is full: {path} was not written; make room and run again.") from error
        raise BesaError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}.") from error


def _open_to_others(folder: Path) -> None:
    """Give the folder and its files the permissions of any new file: temporary ones are private."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)
