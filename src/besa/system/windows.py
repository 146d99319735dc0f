"""What Windows says of memory and of processes, where other systems have files in /proc and POSIX calls.

Sizes are in bytes. The structures are those of the Windows API, by the names that its documentation has.
"""

from __future__ import annotations

import ctypes
from typing import Any

SYNCHRONIZE, TIMED_OUT = 0x00100000, 0x102


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX."""

    _fields_ = [
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "available", "page_total", "page_available", "v1", "v2", "v3")),
    ]


class _ProcessMemory(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS."""

    _fields_ = [
        ("length", ctypes.c_uint32),
        ("faults", ctypes.c_uint32),
        *((name, ctypes.c_size_t) for name in ("peak", "current", "q1", "q2", "q3", "q4", "page_file", "page_peak")),
    ]


def _kernel() -> Any:
    kernel = ctypes.CDLL("kernel32")
    kernel.GetCurrentProcess.restype = kernel.OpenProcess.restype = ctypes.c_void_p
    return kernel


def machine_memory() -> tuple[int, int]:
    """Memory of this machine, and what of it is available."""
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    _kernel().GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status.total), int(status.available)


def process_memory() -> tuple[int, int]:
    """Largest and present resident size of this process."""
    kernel, counters = _kernel(), _ProcessMemory(length=ctypes.sizeof(_ProcessMemory))
    process = ctypes.c_void_p(kernel.GetCurrentProcess())
    kernel.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.length)
    return int(counters.peak), int(counters.current)


def lives(pid: int) -> bool:
    """Whether a process is there and has not ended; `os.kill(pid, 0)` would end it."""
    kernel = _kernel()
    process = kernel.OpenProcess(SYNCHRONIZE, False, pid)
    if not process:
        return False
    handle = ctypes.c_void_p(process)
    waits: bool = kernel.WaitForSingleObject(handle, 0) == TIMED_OUT
    kernel.CloseHandle(handle)
    return waits
