"""The fastest of several ways to compute a product: measured once on a machine, then read from the cache.

The ways differ in the rounding of their sums, so all processes of a machine must choose alike (`once`).
"""

from __future__ import annotations

import hashlib
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from besa.kernels.build import assembled
from besa.kernels.once import once

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 256)  # rows of x for which ways are compared
ROUNDS = 5
Work = Callable[[], object]


def fastest(
    subject: str,
    sources: Sequence[str],
    ways: Sequence[str],
    prepare: Callable[[], Mapping[str, Callable[[int], Work]]],
) -> list[str]:
    """The name of the fastest way for each of `COUNTS`.

    Args:
        subject: what is multiplied, in words; measured apart for each number of threads.
        sources: the C++ files of the ways: when they change, it is measured again.
        ways: their names.
        prepare: makes an example; gives for each way a function from a number of rows to the work.
    """
    if len(ways) == 1:
        return [*ways] * len(COUNTS)
    texts = b"".join(map(assembled, sources))
    threads = str(torch.get_num_threads())
    depends_on = [hashlib.sha256(texts).hexdigest(), torch.__version__, threads, *ways, *map(str, COUNTS)]

    def allowed(found: Any) -> bool:
        return isinstance(found, list) and len(found) == len(COUNTS) and all(name in ways for name in found)

    measured: list[str] = once(f"ways for {subject}", depends_on, allowed, lambda: _measured(prepare()))
    return measured


def place(count: int) -> int:
    """The place in `COUNTS` of the largest number that is not above a number of rows."""
    return bisect_right(COUNTS, count) - 1


def _measured(works: Mapping[str, Callable[[int], Work]]) -> list[str]:
    names = []
    for count in COUNTS:
        prepared = {way: make(count) for way, make in works.items()}
        seconds = {way: min(_seconds(prepared[way]) for _ in range(ROUNDS)) for way in prepared}
        names.append(min(seconds, key=lambda way: seconds[way]))
    return names


def _seconds(work: Work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
