"""Write files completely or not at all, even if the process is killed or others write to the same place.

It needs Python's own library alone, so that `besa doctor` can write what it found where packages are missing.
"""

from __future__ import annotations

import errno
import glob
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from besa.errors import BesaError
from besa.storage import locking
from besa.storage.folders import check_regular
from besa.storage.locking import locked, remove, removed
from besa.storage.names import nearest, path_of

LOCK = "besa.lock"  # name of the file in a folder that the process at work there has locked


def check_absent(out: Path) -> None:
    """Check that nothing would be overwritten.

    Raises:
        BesaError: `out` exists already, if only as a link to nothing, or no new file can have that name.
    """
    with explained(out):
        path = path_of(out)
        if path.name == "..":
            raise BesaError(f"{out} is no name for something new: end it with a name.")
        if os.path.lexists(path):
            raise BesaError(f"{out} exists already: choose another name, or remove it first.")


@contextmanager
def claimed(folder: Path, out: Path) -> Iterator[None]:
    """While open, only this process works in the folder. The claim ends with the process.

    Args:
        folder: to work in; made if it does not exist.
        out: the result, for messages. If it is another place than the folder, all in the folder is besa's.

    Raises:
        BesaError: another process has the folder, it cannot be written, it holds a pipe or a device, or something that
            is not besa's where all should be; the result could not be renamed from there to another place.
    """
    with explained(out):
        if folder != out and (folder.is_symlink() or os.path.ismount(folder)):
            raise BesaError(
                f"{folder} is a link or a file system of its own, from which {out} cannot be renamed: remove it, or "
                "choose a place on that file system."
            )
        folder.mkdir(parents=True, exist_ok=True)
        check_regular(folder)
        if folder != out and not (folder / LOCK).exists() and any(folder.iterdir()):
            raise BesaError(f"{folder} is in the way and was not made by besa: rename it, or choose another name.")
        try:
            lock = (folder / LOCK).open("a")
        except OSError:
            with suppress(OSError):  # a folder of an earlier process is not empty
                folder.rmdir()
            raise
    with lock:
        if not locked(lock) or removed(lock):  # removed: the former owner has just finished
            raise BesaError(f"Another besa process is writing {out}: wait for it, or choose another name.")
        try:
            yield
        finally:
            # Windows keeps open files when their folder is removed.
            if locking.WINDOWS and [path.name for path in folder.glob("*")] == [LOCK]:
                remove(lock, folder / LOCK)
                with suppress(OSError):  # the next process has come
                    folder.rmdir()


@contextmanager
def taken(lock: Path) -> Iterator[bool]:
    """While open, this process does a piece of work unless another one does; yields whether it is this one.

    Args:
        lock: a file that stands for the work; it is gone when the work is done. A killed process leaves it unlocked.

    Raises:
        BesaError: it cannot be written.
    """
    with explained(lock):
        file = lock.open("a")
    with file:
        if not locked(file) or removed(file):  # removed: another process has just finished
            yield False
            return
        try:
            yield True
        finally:
            remove(file, lock)


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder to fill. It is renamed to `out` at the end, or removed after an error.

    Leftovers of killed processes are removed first.

    Raises:
        BesaError: `out` exists already, another process is writing it, or it cannot be written.
    """
    check_absent(out)
    partial = out.with_name(f".{out.name}.partial")
    with claimed(partial, out), explained(out):
        folder = partial / "checkpoint"
        try:
            check_absent(out)
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir()
            yield folder
            folder.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to. The file is flushed to disk and renamed to `path` at the end, so `path` is always whole.

    If several processes write the same file, the last one wins. Leftovers of killed processes are removed.

    Raises:
        BesaError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for other in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            with suppress(OSError, BesaError), other.open("r+b") as file:
                # No process has it locked, and the name still means the same file.
                if locked(file) and os.path.samestat(os.fstat(file.fileno()), other.stat()):
                    remove(file, other)
        with _held(partial) as held:
            try:
                yield partial
                with partial.open("r+b") as file:
                    os.fsync(file.fileno())
                if locking.WINDOWS:  # which renames no open file
                    held.close()
                partial.replace(path)
            finally:
                remove(held, partial)


def _held(path: Path) -> IO[bytes]:
    """A new, locked file. If another process removes it as abandoned before it is locked, it is made again."""
    while True:
        file = path.open("wb")
        with suppress(BesaError):  # on file systems without locks, no leftovers are removed
            locked(file, wait=True)
        if not removed(file):
            return file
        file.close()


def write_file(path: Path, text: str) -> None:
    """Write `text` to `path`.

    Raises:
        BesaError: the file cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_space(out: Path, size: int) -> None:
    """Check that the disk has enough free space.

    Args:
        out: file or folder to write.
        size: its bytes.

    Raises:
        BesaError: the disk has fewer bytes free.
    """
    free = shutil.disk_usage(nearest(out)).free
    if free < size:
        raise BesaError(f"{out} needs {_in_words(size)} but only {_in_words(free)} are free there: make room first.")


def _in_words(size: int) -> str:
    """Bytes in a unit (powers of ten) in which they are no zero."""
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB") if size >= 1e6 else (1e3, "kB")
    return f"{size / unit:,.2f} {name}"


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """While open, the operating system's errors in writing `path` become a `BesaError` of one sentence."""
    try:
        yield
    except _errors() as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BesaError(f"The disk is full: {path} was not written; make room and run again.") from error
        raise BesaError(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or error}"
            f"{'; choose another name' if isinstance(error, NotADirectoryError | FileExistsError) else ''}."
        ) from error


def _errors() -> tuple[type[Exception], ...]:
    """Errors meanwhile: the operating system's, and those of reading safetensors if it has been imported."""
    module = sys.modules.get("safetensors")
    return (OSError,) if module is None else (OSError, module.SafetensorError)
