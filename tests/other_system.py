"""Prune and measure a model as on another system: `python other_system.py SYSTEM MODEL TEXT FOLDER`.

On a pretended macOS there is no /proc and no call that only Linux has. On a pretended Windows there is no call that
only POSIX has, either, locks are msvcrt's, kernel32 answers, and no open file can be removed or renamed.
"""

import ctypes
import errno
import importlib
import os
import pathlib
import sys
import types
from pathlib import Path

LINUX = ("posix_fallocate", "posix_fadvise", "sched_getaffinity", "sched_setaffinity", "memfd_create")
POSIX = ("geteuid", "getuid", "sysconf", "fork", "kill", "killpg", "setsid", "chown", "mkfifo", "getloadavg", "uname")
MODULES = ("fcntl", "resource", "termios", "pwd", "grp", "pty", "tty")
GB = 1_000_000_000


def without_proc() -> None:
    """Nothing is in /proc."""
    opened = pathlib.Path.open

    def guarded(self, *arguments, **options):
        if str(self).startswith("/proc"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))
        return opened(self, *arguments, **options)

    pathlib.Path.open = guarded
    pathlib.Path.read_text = lambda self, encoding=None, errors=None: _read(guarded, self, encoding, errors)


def _read(opened, path, encoding, errors):
    with opened(path, encoding=encoding, errors=errors) as file:
        return file.read()


class Msvcrt(types.ModuleType):
    """Locks of a byte, by file: all belong to this process, so a second one is refused."""

    LK_LOCK, LK_NBLCK = 1, 2

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self.held = {}

    def locking(self, descriptor, mode, count):
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == 1 << 43 and count == 1
        status = os.fstat(descriptor)
        other = self.held.get((status.st_dev, status.st_ino))
        if other is not None and other != descriptor and _same(other, status):
            raise PermissionError(errno.EACCES, "Permission denied")
        self.held[status.st_dev, status.st_ino] = descriptor


def _same(descriptor, status):
    try:
        return os.path.samestat(os.fstat(descriptor), status)
    except OSError:  # closed: the lock has ended
        return False


class Kernel32:
    """The functions that besa calls, with the answers of a machine of 8 GB."""

    def __init__(self) -> None:
        self.GetCurrentProcess = type("Function", (), {"__call__": lambda self: 1})()
        self.OpenProcess = type("Function", (), {"__call__": lambda self, access, inherit, pid: pid % 2})()

    def GlobalMemoryStatusEx(self, status):
        assert status._obj.length == 64
        status._obj.total, status._obj.available = 8 * GB, 5 * GB

    def K32GetProcessMemoryInfo(self, process, counters, size):
        assert size == counters._obj.length == 72
        counters._obj.peak, counters._obj.current = 2 * GB, GB

    def WaitForSingleObject(self, handle, milliseconds):
        return 0x102

    def CloseHandle(self, handle):
        return 1


def open_files():
    """What this process has open, or in its memory."""
    with open("/proc/self/maps", encoding="utf-8") as maps:  # noqa: PTH123 (there is none for Path here)
        yield from {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
    for descriptor in os.listdir("/proc/self/fd"):  # noqa: PTH208 (it calls what is guarded here)
        yield os.path.realpath(f"/proc/self/fd/{descriptor}")


def refused(function):
    """As a call that removes or renames a file, which an open one does not let happen."""

    def guarded(path, *arguments, dir_fd=None, **options):
        place = os.path.realpath(path) if dir_fd is None else os.path.realpath(f"/proc/self/fd/{dir_fd}/{path}")
        if place in open_files() and not Path(place).is_dir():
            raise PermissionError(errno.EACCES, "The process cannot access the file: it is being used", str(path))
        return function(path, *arguments, **options | ({} if dir_fd is None else {"dir_fd": dir_fd}))

    return guarded


def pretend(system: str) -> None:
    """Be on a system; what others than besa need is imported before."""
    for name in LINUX:
        if hasattr(os, name):
            delattr(os, name)
    without_proc()
    if system == "darwin":
        sys.platform = "darwin"
        return
    for name in POSIX:
        if hasattr(os, name):
            delattr(os, name)
    for name in MODULES:
        sys.modules[name] = None
    sys.modules["msvcrt"] = Msvcrt()
    for name in ("unlink", "remove", "rename", "replace"):
        setattr(os, name, refused(getattr(os, name)))
    library = ctypes.CDLL
    ctypes.CDLL = lambda name, **options: Kernel32() if name == "kernel32" else library(name, **options)
    importlib.import_module("besa.storage.locking").WINDOWS = True


def main(system: str, model: str, text: str, folder: str) -> None:
    """Prune, evaluate, and write the report."""
    import compressed_tensors  # noqa: F401
    import huggingface_hub  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import platformdirs.unix  # noqa: F401
    import safetensors.torch  # noqa: F401
    import transformers  # noqa: F401

    pretend(system)
    from besa.cli import app

    def besa(*words):
        app([*map(str, words)], prog_name="besa", standalone_mode=False)

    out = Path(folder, "out")
    sizes = ("--samples", "4", "--seqlen", "32", "--calibration", text)
    besa("prune", model, out, "--recipe", "wanda", *sizes, "--activation-budget", "0")
    besa("eval", out, "--ppl", text, "--window", "32", "--max-windows", "2", "--json", out / "besa_eval.json")
    besa("report", out, "--out", Path(folder, "report.html"))
    besa("verify", out)


if __name__ == "__main__":
    main(*sys.argv[1:])
