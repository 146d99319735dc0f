"""File locks that the system releases when the process ends: `flock`, or a locked byte on Windows."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from besa.errors import BesaError

WINDOWS = os.name == "nt"
TAKEN = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # another process has the lock; EDEADLK is of Windows
FAR = 1 << 43  # the byte that is locked on Windows, where what is locked can be neither read nor written


def locked(file: IO[Any], wait: bool = False) -> bool:
    """Lock an open file, and return whether it is locked now.

    Args:
        file: of which nothing is read or written through this object.
        wait: until another process releases the lock; else return False if another process holds it.

    Raises:
        BesaError: the file system has no locks.
    """
    try:
        if WINDOWS:
            msvcrt: Any = import_module("msvcrt")
            os.lseek(file.fileno(), FAR, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        else:
            fcntl: Any = import_module("fcntl")
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in TAKEN:
            raise BesaError(
                f"The file system of {file.name} has no locks ({error.strerror}), which keep two runs apart: choose a "
                "place on another."
            ) from error
        return False
    return True


def removed(file: IO[Any]) -> bool:
    """Whether an open file has been removed. On Windows nobody can remove it."""
    return os.fstat(file.fileno()).st_nlink == 0


def remove(file: IO[Any], path: Path) -> None:
    """Remove an open file and release its lock, in an order in which no other process can lock the removed file."""
    if WINDOWS:  # an open file cannot be removed, by others either
        file.close()
        with suppress(OSError):
            path.unlink()
    else:
        path.unlink(missing_ok=True)
        file.close()
