"""Hidden states of the whole calibration set: on the device, in memory of the host, or in a mapped file.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from besa.errors import BesaError
from besa.system import ranks
from besa.system.devices import CPU, available_bytes, has_streams, is_available, shares_memory

Place = Literal["device", "host", "file"]


class HiddenStates(Protocol):
    """N sequences of hidden states, read and written a few at a time; a tensor (N, T, C) fits this protocol."""

    @property
    def shape(self) -> torch.Size:
        """Shape (N, T, C)."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states."""

    def __len__(self) -> int:
        """Number of sequences N."""

    def __getitem__(self, index: Any) -> Tensor:
        """The sequences (n, T, C) of a slice; of a tensor, a view."""

    def __setitem__(self, index: Any, x_NTC: Tensor) -> None:
        """Replace those sequences."""


class Room:
    """The memory in which a run may keep hidden states: that of its device, then that of the host, then files.

    Hidden states go to the first of these that has room for all of them. Those on the device together never take more
    than the budget, and neither do those in memory of the host. A device that computes in the host's memory has one
    budget for both.

    Args:
        device: where blocks are computed.
        budget: bytes on the device, and as many on the host; by default a quarter of what is free on the device, and
            half of what is free on the host, divided by the ranks on this machine.
        folder: of the files; by default the folder of temporary files.
    """

    def __init__(self, device: torch.device = CPU, budget: int | None = None, folder: Path | None = None) -> None:
        self._device = device
        self._folder = folder
        self._left: dict[Place, int] = {}
        if device.type != "cpu":
            self._left["device"] = _limit(device, budget)
        if device.type == "cpu" or not shares_memory(device):
            self._left["host"] = _limit(CPU, budget)

    def take(self, size: int) -> tuple[Place, int]:
        """Take room for so many bytes; returns the place, and the bytes that are gone there."""
        for place, left in self._left.items():
            pinned = place == "host" and has_streams(self._device)
            taken = 1 << (size - 1).bit_length() if pinned else size  # torch pins memory in powers of two
            if taken <= left:
                self._left[place] -= taken
                return place, taken
        return "file", 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> HiddenStates:
        """Hidden states (N, T, C), not yet written. Their room is given back when they are no longer in use.

        Raises:
            BesaError: the disk has no room for the file.
        """
        size = math.prod(shape) * dtype.itemsize
        place, taken = self.take(size)
        if place == "file":
            return MappedStates(shape, dtype, size, self._folder)
        on_device = place == "device"
        x_NTC = torch.empty(
            shape,
            dtype=dtype,
            device=self._device if on_device else CPU,
            pin_memory=not on_device and has_streams(self._device),
        )
        weakref.finalize(x_NTC, self._give_back, place, taken).atexit = False
        return x_NTC

    def empty_like(self, x_NTC: HiddenStates) -> HiddenStates:
        """Hidden states of the same shape and dtype, not yet written."""
        return self.empty(x_NTC.shape, x_NTC.dtype)

    def _give_back(self, place: Place, taken: int) -> None:
        self._left[place] += taken


def _limit(device: torch.device, budget: int | None) -> int:
    """Bytes that hidden states may take in the memory of a device; without limit if it is not there to be asked."""
    if budget is not None:
        return budget
    if not is_available(device):
        return sys.maxsize
    return available_bytes(device) // (2 * ranks.here() if shares_memory(device) else 4)


class MappedStates:
    """Hidden states in a file without a name, which the system removes however the process ends."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, size: int, folder: Path | None) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                _reserve(file.fileno(), size, folder)
                self._map = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise BesaError(
                f"{size / 1e9:.1f} GB of activations do not fit into the activation budget, nor into a file "
                f"({error.strerror}): make room, raise --activation-budget or use fewer --samples."
            ) from error
        self._x_NTC = torch.frombuffer(self._map, dtype=dtype).view(shape)

    def __len__(self) -> int:
        return len(self._x_NTC)

    def __getitem__(self, index: Any) -> Tensor:
        part_NTC = self._x_NTC[index].clone()
        self._let_go()
        return part_NTC

    def __setitem__(self, index: Any, x_NTC: Tensor) -> None:
        self._x_NTC[index] = x_NTC.to(CPU)
        self._let_go()

    def _let_go(self) -> None:
        """Release the pages: the system keeps or writes them as it likes, and the process's memory does not grow."""
        if hasattr(self._map, "madvise"):  # Windows decides by itself
            self._map.madvise(mmap.MADV_DONTNEED)


def _reserve(file: int, size: int, folder: Path | None) -> None:
    """Give a file its size on the disk: a full disk is an error now, and not a signal during the run.

    Raises:
        OSError: the disk has too few bytes free.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    if shutil.disk_usage(folder or tempfile.gettempdir()).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(file, size)
