"""Hidden states of the whole calibration set: in memory, or in a mapped file when they are too many.

Shape suffixes: N sequences, T tokens, C channels of the residual stream.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from besa.errors import BesaError


class HiddenStates(Protocol):
    """N sequences of hidden states, read and written a few at a time; a tensor (N, T, C) fits this protocol."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, index: Any) -> Tensor:
        """The sequences (n, T, C) at `index`, a slice or a tensor of positions."""

    def __setitem__(self, index: Any, x_NTC: Tensor) -> None:
        """Replace those sequences."""


def empty_states(
    shape: tuple[int, int, int], dtype: torch.dtype, budget: int, folder: Path | None = None
) -> HiddenStates:
    """Hidden states (N, T, C), not yet written: in memory, or in a mapped file if they are too large.

    Args:
        shape: N, T, C.
        dtype: of the hidden states.
        budget: bytes that they may take in memory; larger ones go into a file.
        folder: where the file is made; by default where temporary files go.

    Raises:
        BesaError: the disk has no room for the file.
    """
    size = math.prod(shape) * dtype.itemsize
    if size <= budget:
        return torch.empty(shape, dtype=dtype)
    return MappedStates(shape, dtype, size, folder)


class MappedStates:
    """Hidden states in a file without a name, which the system removes however the process ends."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, size: int, folder: Path | None) -> None:
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(
                    file.fileno(), 0, size
                )  # a full disk is an error now, and not a signal during the run
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
        self._x_NTC[index] = x_NTC.to(self._x_NTC.device)
        self._let_go()

    def _let_go(self) -> None:
        """Release the pages: the system keeps or writes them as it likes, and the process's memory does not grow."""
        self._map.madvise(mmap.MADV_DONTNEED)
