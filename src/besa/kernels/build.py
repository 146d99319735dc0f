"""C++ kernels: from the wheel, or compiled once with this machine's compiler and kept in the cache; loaded by ctypes.

Each library holds its kernels for several instruction sets and asks the processor which it has, so one that was
compiled elsewhere for the same architecture and system runs here. A wheel of a platform brings them (`prebuild`).

A loaded library is code that runs. It therefore comes from the package or from a folder that only this user can write,
or is compiled again. Its name holds two digests: one of source, flags and, in the cache, the compiler, and one of its
own bytes, because loading a damaged file would kill the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from besa.data.assets import cache_dir
from besa.errors import Notice
from besa.storage import locking

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-ffp-contract=off")
# The kernels are linked without OpenMP's library. They use that of torch, which is loaded already, and so torch's
# threads; a second pool of threads would compete for the cores. If torch has no such library, they use one thread.
# Apple's clang takes the flag only past its driver, and its linker must be told that torch has what is missing.
OPENMP_FLAGS = (("-fopenmp",), ("-Xclang", "-fopenmp"), ())
LINK_FLAGS = ("-shared", *(("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()))
HERE = Path(__file__).parent
PREBUILT = "prebuilt"  # the folder of a wheel's libraries, beside their sources
INSTRUCTIONS = ("avx512", "avx2", "plain")  # that most kernels are compiled for, best first
OTHERS = 0o022  # the permission to write, for all users except the owner


def compiler() -> str | None:
    """The path of the C++ compiler that CXX names, or of a usual one; None if there is none."""
    return next((path for name in (os.environ.get("CXX"), *COMPILERS) if name and (path := shutil.which(name))), None)


@cache
def load(source: str) -> ctypes.CDLL | None:
    """The kernels of one C++ file of this package; None, with a notice, if they cannot be compiled.

    Args:
        source: name of the file.
    """
    text = assembled(source)
    for path in (HERE / PREBUILT).glob(f"{_prebuilt_key(text)}-*.so"):
        with suppress(OSError):  # the library needs what this system does not have
            if path.name == _name(_prebuilt_key(text), path):
                return _opened(path)
    found = compiler()
    reason = "there is no C++ compiler here"
    if locking.WINDOWS:
        reason = "its kernels are for Linux and macOS"
    elif found is not None:
        for openmp in OPENMP_FLAGS:
            try:
                library = _loaded(found, (*FLAGS, *openmp), text)
            except (OSError, subprocess.CalledProcessError) as error:
                message = getattr(error, "stderr", None) or str(error)
                reason = f"{found} failed: {' '.join(message.split())[:200]}"
                continue
            if not openmp:
                warnings.warn(f"besa's kernels use one thread, without OpenMP: {reason}.", Notice, stacklevel=2)
            return library
    warnings.warn(f"besa computes more slowly than it could, in plain torch: {reason}.", Notice, stacklevel=2)
    return None


def function(source: str, name: str, arguments: Iterable[type]) -> Any:
    """A kernel that returns nothing, from a C++ file that this machine has loaded.

    Args:
        source: name of the file.
        name: of the kernel.
        arguments: their types of ctypes.
    """
    kernels = load(source)
    assert kernels is not None
    found = kernels[name]
    found.argtypes, found.restype = list(arguments), None
    return found


def runnable(source: str, names: Iterable[str] = INSTRUCTIONS) -> list[str]:
    """The ways to compute for which a C++ file has kernels that this processor can run; none if it cannot be compiled.

    Args:
        source: name of the file.
        names: of the ways; the order stays.
    """
    kernels = load(source)
    if kernels is None:
        return []
    return [name for name in names if hasattr(kernels, f"has_{name}") and bool(kernels[f"has_{name}"]())]


def prebuild(folder: Path) -> list[Path]:
    """Compile all kernels for a wheel; the same compiler gives the same bytes.

    Args:
        folder: to write the libraries to.

    Raises:
        OSError: there is no compiler.
        CalledProcessError: compiling failed, or the compiler knows no OpenMP.
    """
    found = compiler()
    if found is None:
        raise OSError("There is no C++ compiler: install one, or set CXX.")
    return [_prebuilt(found, assembled(path.name), folder) for path in sorted(HERE.glob("*.cpp"))]


def _prebuilt(compiler: str, text: bytes, folder: Path) -> Path:
    with tempfile.TemporaryDirectory() as scratch:
        openmp = OPENMP_FLAGS[1 if sys.platform == "darwin" else 0]
        library = _compiled(compiler, (*FLAGS, *openmp), text, Path(scratch))
        return Path(shutil.move(library, folder / _name(_prebuilt_key(text), library)))


def _prebuilt_key(text: bytes) -> str:
    """Key that a wheel's library of the C++ `text` must match."""
    return hashlib.sha256("\0".join((platform.machine(), platform.system(), *FLAGS)).encode() + text).hexdigest()[:32]


def assembled(name: str, folder: Path = HERE) -> bytes:
    """The text of a C++ file of a folder, in which the files that it includes from there are inserted."""
    text = (folder / name).read_bytes()
    return re.sub(rb'^#include "(.+)"$', lambda found: assembled(found[1].decode(), folder), text, flags=re.MULTILINE)


def _loaded(compiler: str, flags: tuple[str, ...], text: bytes) -> ctypes.CDLL:
    """The shared library of the C++ `text`: from the cache, or compiled now.

    Raises:
        OSError: the compiler cannot be started, or the library cannot be loaded.
        CalledProcessError: compiling failed.
    """
    inputs = (platform.machine(), platform.system(), compiler, _call(compiler, "--version"), *flags)
    key = hashlib.sha256("\0".join(inputs).encode() + text).hexdigest()[:32]
    folder = _private_folder()
    for path in [] if folder is None else folder.glob(f"{key}-*.so"):
        if path.name == _name(key, path):  # else the file is damaged
            return _opened(path)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as scratch:
        library = _compiled(compiler, flags, text, Path(scratch))
        return _opened(library if folder is None else library.replace(folder / _name(key, library)))


def _compiled(compiler: str, flags: tuple[str, ...], text: bytes, scratch: Path) -> Path:
    code, built = scratch / "kernels.cpp", scratch / "kernels.o"
    library = built.with_suffix(".so")
    code.write_bytes(text)
    _call(compiler, *flags, "-c", str(code), "-o", str(built))
    _call(compiler, *LINK_FLAGS, str(built), "-o", str(library))
    return library


def _private_folder() -> Path | None:
    """The folder of compiled libraries; None, with a notice, if other users can write to it."""
    folder = cache_dir() / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if status.st_uid == os.geteuid() and not status.st_mode & OTHERS and os.access(folder, os.W_OK | os.X_OK):
            return folder
        reason = "is not writable by this user alone"
    except OSError as error:
        reason = f"cannot be made ({error.strerror})"
    warnings.warn(
        f"The kernels are compiled for this run only because {folder} {reason}: remove it, or point BESA_CACHE to a "
        "folder of your own.",
        Notice,
        stacklevel=2,
    )
    return None


def _name(key: str, library: Path) -> str:
    return f"{key}-{hashlib.sha256(library.read_bytes()).hexdigest()[:32]}.so"


def _opened(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library.absolute()), mode=os.RTLD_NOW)


def _call(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, errors="replace").stdout
