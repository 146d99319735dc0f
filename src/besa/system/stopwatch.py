"""The time of a run, by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from besa.system.devices import synchronize


class Stopwatch:
    """Adds up seconds by phase. It waits for the end of a device's work, which may go on behind the program.

    Args:
        device: of the work.

    Attributes:
        seconds: by name of the phase.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """While open, count the time for a phase."""
        began = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self._device)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began
