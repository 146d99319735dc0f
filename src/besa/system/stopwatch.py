"""The time of a run by phase, and what its ranks sent to each other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from besa.system import ranks
from besa.system.devices import synchronize


class Stopwatch:
    """Adds up seconds and bytes by phase. It waits for the end of a device's work, which may go on behind the program.

    Args:
        device: of the work.

    Attributes:
        seconds: by name of the phase.
        sent: bytes that this rank sent to others, likewise (`ranks.sent`).
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.sent: dict[str, int] = {}
        self._device = device

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """While open, count the time for a phase."""
        began, sent = time.perf_counter(), ranks.sent()
        try:
            yield
        finally:
            synchronize(self._device)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began
            if added := ranks.sent() - sent:
                self.sent[phase] = self.sent.get(phase, 0) + added
