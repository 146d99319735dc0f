"""C++ kernels: compiled once for this machine with the compiler it has, kept in the cache, loaded without headers."""

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

from besa.assets import cache_dir
from besa.errors import Notice

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-ffp-contract=off")
# Linked without OpenMP's library: the kernels take that of torch, which is loaded, and with it torch's threads. A
# second pool of threads would fight with it for the cores. Where torch has none of that name: without threads.
WAYS = (("-fopenmp",), ())


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
                return ctypes.CDLL(str(_built(compiler, (*FLAGS, *way), text)), mode=os.RTLD_NOW)
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", None) or str(error)
                reason = f"{compiler} failed: {' '.join(said.split())[:200]}"
    warnings.warn(f"besa computes more slowly than it could, in plain torch: {reason}.", Notice, stacklevel=2)
    return None


def _built(compiler: str, flags: tuple[str, ...], text: bytes) -> Path:
    """Path of the shared library of the C++ `text`, compiled now unless it lies in the cache.

    Raises:
        OSError: the cache cannot be written, or the compiler not started.
        CalledProcessError: it does not compile.
    """
    key = hashlib.sha256("\0".join((platform.machine(), platform.system(), compiler, *flags)).encode() + text)
    folder = cache_dir() / "kernels"
    path = folder / f"{key.hexdigest()[:32]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as scratch:
            code, built = Path(scratch, "kernels.cpp"), Path(scratch, "kernels.o")
            code.write_bytes(text)
            _call(compiler, *flags, "-c", str(code), "-o", str(built))
            _call(compiler, "-shared", str(built), "-o", str(built.with_suffix(".so")))
            built.with_suffix(".so").replace(path)
    return path


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
