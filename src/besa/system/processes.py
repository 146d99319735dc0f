"""What the system knows of processes: whether others were started beside this one, live, and move."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import socket
import threading
import time
from pathlib import Path

from besa.storage import locking
from besa.system import windows

PROC = Path("/proc")
BUSY = 0.05  # share of a core below which threads beside the main one do nothing but draw a bar or pass messages on


def launched() -> bool:
    """Whether torchrun, or another launcher that sets its variables, has started several processes."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def machine() -> str:
    """What tells the machines, or containers, apart whose process numbers mean the same."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {(PROC / 'self/ns/pid').readlink()}"
    except OSError:  # no Linux
        return socket.gethostname()


def started(pid: int) -> str:
    """When a process was started, in the system's units; process numbers are used again. Empty if nothing says it."""
    fields = _fields(PROC / str(pid))
    return fields[19] if fields else ""


def lives(pid: int, since: str) -> bool:
    """Whether the process on this machine that `started` at `since` is there, and no zombie."""
    fields = _fields(PROC / str(pid))
    if fields:
        return fields[0] not in "ZX" and fields[19] == since
    if since:
        return False
    if locking.WINDOWS:
        return windows.lives(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def end(pid: int, since: str) -> None:
    """End a process that no longer moves, also one that is stopped."""
    if lives(pid, since):
        with contextlib.suppress(OSError):
            os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))  # on Windows, any number ends it


def interrupt() -> None:
    """Ctrl-C for this process, from another thread than the main one."""
    if locking.WINDOWS:  # where `os.kill` would end it
        _thread.interrupt_main()
    else:
        os.kill(os.getpid(), signal.SIGINT)


class Movement:
    """Whether this process has moved: its main thread or a child computes, others do, or it reads or writes a disk.

    What the thread that asks has done itself does not count.
    """

    def __init__(self) -> None:
        self._seen: object = None
        self._busy, self._at = 0.0, time.monotonic()

    def seen(self) -> bool:
        """Whether this process has moved since the last call."""
        seen, busy, now = _traces(), time.process_time() - time.thread_time(), time.monotonic()
        moved = seen != self._seen or busy - self._busy > BUSY * (now - self._at)
        self._seen, self._busy, self._at = seen, busy, now
        return moved


def _traces() -> object:
    """What changes while the main thread or a child works, or the disk; None where the system does not tell."""
    main = PROC / "self/task" / str(threading.main_thread().native_id)
    fields = _fields(main)
    if not fields:
        return None
    state, times = fields[0], fields[11:13]
    counts = [line for line in _lines(PROC / "self/io") if line.startswith(("read_bytes", "write_bytes"))]
    if state == "D":  # it waits for a disk: as long as this machine writes any, it may be its turn next
        counts += [line for line in _lines(PROC / "vmstat") if line.startswith(("nr_written", "pgpgin"))]
    children = [_fields(PROC / pid) for line in _lines(main / "children") for pid in line.split()]
    # A child is a compiler or a download, with time limits of its own.
    if any(child and child[0] not in "ZTt" for child in children):
        counts.append(str(time.monotonic()))
    return times, counts


def _fields(process: Path) -> list[str]:
    """What the system says of a process or a thread, from its state on (`man proc`, stat, 3); empty if nothing."""
    text = "".join(_lines(process / "stat"))
    return text[text.rfind(")") + 1 :].split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
