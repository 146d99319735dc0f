"""Peak memory of a run, of this process and of the GPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from besa.storage import locking
from besa.system import cgroups, windows

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGE = 16 << 20  # bytes from which a tensor gets its own pages


def reset_peak(device: torch.device) -> None:
    """Reset the peaks. If the system cannot, peaks stay those of the whole process.

    Args:
        device: that torch has used already (`resolve_device`): CUDA refuses to reset what it has not begun to count.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if reset := getattr(torch.get_device_module(device), "reset_peak_memory_stats", None):
        reset(device)


def peak_bytes() -> int:
    """Largest resident size of this process since `reset_peak`, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if locking.WINDOWS:
        return windows.process_memory()[0]
    resource: Any = import_module("resource")
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def peak_gpu_bytes(device: torch.device) -> int | None:
    """Largest GPU allocation since `reset_peak`, in bytes; None on the CPU, and on devices that do not count it."""
    ask = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return int(ask(device)) if ask else None


def current_bytes() -> int:
    """Present resident size of this process, in bytes; the peak if the system does not give it."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return windows.process_memory()[1] if locking.WINDOWS else peak_bytes()
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def total_bytes() -> int:
    """Memory of this machine, in bytes, or as much of it as the control groups of this process allow."""
    if locking.WINDOWS:
        return windows.machine_memory()[0]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit.most for limit in cgroups.limits())])


def available_bytes() -> int:
    """Bytes of memory that are still available to this process."""
    free = windows.machine_memory()[1] if locking.WINDOWS else total_bytes()
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    return min([free, *(max(0, limit.most - limit.used) for limit in cgroups.limits())])


def stay_lean() -> None:
    """Let the memory of large tensors return to the system when they are freed; glibc would keep it in pieces.

    This changes the allocator of the whole process, so only programs call it, not the library.

    Smaller tensors, such as activations, reuse memory: new pages for each would cost a seventh of the time of a forward
    pass. `trim` returns that memory. Other C libraries than glibc do not know these settings and stay as they are.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: Windows has no such library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(M_TRIM_THRESHOLD, 4 * LARGE)
    trim()


def trim() -> None:
    """Return unused memory of the allocator to the system."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
