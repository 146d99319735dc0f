"""C++ kernels: compiled once for this machine with the compiler it has, kept in the cache, loaded without headers.

What is loaded runs, so it comes from a folder that only this user can write, or is compiled anew. A library is known by
its name: a digest of what it was made of (source, compiler, flags), and one of its own bytes, without which a damaged
file would end the process.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from importlib import resources
from pathlib import Path

from besa.data.assets import cache_dir
from besa.errors import Notice

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-ffp-contract=off")
# Linked without OpenMP's library: the kernels take that of torch, which is loaded, and with it torch's threads. A
# second pool of threads would fight with it for the cores. Where torch has none of that name: without threads.
WAYS = (("-fopenmp",), ())
OTHERS = 0o022  # the right to write, of all users but the owner


@cache
def load(source: str) -> ctypes.CDLL | None:
    """The kernels of one C++ file of this package; None, with a notice, where they cannot be compiled.

    Args:
        source: name of the file.
    """
    text = (resources.files("besa.kernels") / source).read_bytes()
    compiler = next(
        (path for name in (os.environ.get("CXX"), *COMPILERS) if name and (path := shutil.which(name))), None
    )
    reason = "there is no C++ compiler here"
    if compiler is not None:
        for way in WAYS:
            try:
                library = _loaded(compiler, (*FLAGS, *way), text)
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", None) or str(error)
                reason = f"{compiler} failed: {' '.join(said.split())[:200]}"
                continue
            if not way:
                warnings.warn(f"besa's kernels use one thread, without OpenMP: {reason}.", Notice, stacklevel=2)
            return library
    warnings.warn(f"besa computes more slowly than it could, in plain torch: {reason}.", Notice, stacklevel=2)
    return None


def _loaded(compiler: str, flags: tuple[str, ...], text: bytes) -> ctypes.CDLL:
    """The shared library of the C++ `text`: from the cache, or compiled now.

    Raises:
        OSError: the compiler cannot be started, or what it made cannot be loaded.
        CalledProcessError: it does not compile.
    """
    made_of = (platform.machine(), platform.system(), compiler, _call(compiler, "--version"), *flags)
    key = hashlib.sha256("\0".join(made_of).encode() + text).hexdigest()[:32]
    folder = _own_folder()
    for path in [] if folder is None else folder.glob(f"{key}-*.so"):
        if path.name == _name(key, path):  # else it is damaged
            return _opened(path)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as scratch:
        code, built = Path(scratch, "kernels.cpp"), Path(scratch, "kernels.o")
        library = built.with_suffix(".so")
        code.write_bytes(text)
        _call(compiler, *flags, "-c", str(code), "-o", str(built))
        _call(compiler, "-shared", str(built), "-o", str(library))
        return _opened(library if folder is None else library.replace(folder / _name(key, library)))


def _own_folder() -> Path | None:
    """The folder that keeps libraries; None, with a notice, where others could put theirs into it."""
    folder = cache_dir() / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if found.st_uid == os.geteuid() and not found.st_mode & OTHERS and os.access(folder, os.W_OK | os.X_OK):
            return folder
        reason = "is not this user's alone to write"
    except OSError as error:
        reason = f"cannot be made ({error.strerror})"
    warnings.warn(
        f"The kernels are compiled for this run only, as {folder} {reason}: remove it, or point BESA_CACHE to a folder "
        "of your own.",
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
