"""What besa asks of the system: nothing that only some have, unless the place says what others do."""

import ast
import sys
from pathlib import Path

import pytest

import besa
from besa.storage import locking
from besa.system import memory, processes, windows
from tests.other_system import GB, LINUX, MODULES, POSIX, Kernel32

SOURCES = Path(besa.__file__).parent
# Each of these asks for the system, or whether the function is there, before it calls it.
GUARDED = {
    "kernels/build.py": {"geteuid", "RTLD_NOW"},
    "models/activations.py": {"posix_fallocate", "madvise", "MADV_DONTNEED"},
    "storage/weights.py": {"posix_fadvise", "POSIX_FADV_WILLNEED"},
    "system/memory.py": {"sysconf"},
    "system/processes.py": {"kill"},
}
OF_SOME = {
    *LINUX,
    *POSIX,
    "RTLD_NOW",
    "POSIX_FADV_WILLNEED",
    "madvise",
    "MADV_DONTNEED",
    "SIGKILL",
    "SIGHUP",
    "SIGUSR1",
}
OF_SOME |= {
    "SIGPIPE",
    "SIGALRM",
    "pipe2",
    "O_NOFOLLOW",
    "O_DIRECTORY",
    "fchmod",
    "symlink",
    "lchown",
    "statvfs",
    "wait4",
}


@pytest.fixture(scope="module")
def trees():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES.rglob("*.py")}


def test_no_module_of_posix_is_imported(trees):
    for path, tree in trees.items():
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not names & {*MODULES}, path


def test_what_only_some_systems_have_is_asked_for_where_it_is_known(trees):
    found = {}
    for path, tree in trees.items():
        asked = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in OF_SOME]
        names = {node.attr for node in asked if ast.unparse(node.value) in ("os", "signal", "mmap", "self._map")}
        if names & OF_SOME:
            found[path.relative_to(SOURCES).as_posix()] = names & OF_SOME
    assert found == GUARDED


def test_windows_tells_memory_and_processes(monkeypatch):
    monkeypatch.setattr(locking, "WINDOWS", True)
    monkeypatch.setattr(windows.ctypes, "CDLL", lambda name: Kernel32())
    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(processes, "PROC", Path("/absent"))
    monkeypatch.setitem(sys.modules, "resource", None)
    assert memory.total_bytes() == 8 * GB and memory.available_bytes() == 5 * GB
    assert memory.peak_bytes() == 2 * GB and memory.current_bytes() == GB
    assert processes.lives(3, "") and not processes.lives(2, "")


def test_ctrl_c_does_not_end_a_process_of_windows(monkeypatch):
    interrupted = []
    monkeypatch.setattr(locking, "WINDOWS", True)
    monkeypatch.setattr(processes._thread, "interrupt_main", lambda: interrupted.append(1))
    processes.interrupt()
    assert interrupted == [1]


def test_macos_counts_memory_in_bytes(monkeypatch):
    monkeypatch.setattr(Path, "read_text", absent)
    in_kilobytes = memory.peak_bytes()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert 1000 < in_kilobytes / memory.peak_bytes() < 1050
    assert memory.current_bytes() == memory.peak_bytes()
    assert memory.available_bytes() == memory.total_bytes()


def absent(self, *arguments, **options):
    raise FileNotFoundError(str(self))
