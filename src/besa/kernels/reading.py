"""How a sparse weight is read for one row of x: bands at once, distance of the prefetch, and the cache it goes to.

Which way is fastest depends on a processor's caches and prefetchers, which its instruction sets do not tell. So it is
measured once on each machine, and cached. Every way adds in the same order: results are equal to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from besa.kernels.once import once

ROUNDS = 5
MARGIN = 0.98  # of the usual way's time: what is not faster than this may be chance


class Way(NamedTuple):
    """How a weight is read; zeros stand for the usual.

    Attributes:
        bands: read at once.
        ahead: distance of the prefetch, in bytes.
        first: 1 if the prefetch goes to the first-level cache.
    """

    bands: int
    ahead: int
    first: int


Work = Callable[[Way], object]
USUAL = Way(0, 0, 0)
AHEAD = ((3072, 0), (6144, 0), (1536, 1), (3072, 1))  # bytes, and whether to the first cache, which is small
WAYS = [USUAL, *(Way(bands, *ahead) for bands in (1, 2, 4) for ahead in AHEAD)]


def fastest(name: str, works: Callable[[], Sequence[Work]]) -> Way:
    """The fastest way on this machine: from the cache, or measured now.

    Args:
        name: of the work and the kernels that do it.
        works: gives pieces of work, which read more memory together than the caches hold.
    """
    ways = [list(way) for way in WAYS]
    return Way(*once(f"how to read {name}", [], lambda found: found in ways, lambda: list(_measured(works()))))


def _measured(works: Sequence[Work]) -> Way:
    """Time each way in turn, several times; the least time of each piece counts, as others can only add to it."""
    seconds = {way: [float("inf")] * len(works) for way in WAYS}
    for _ in range(ROUNDS):
        for way, least in seconds.items():
            for i, work in enumerate(works):
                began = time.perf_counter()
                work(way)
                least[i] = min(least[i], time.perf_counter() - began)
    best = min(WAYS, key=lambda way: sum(seconds[way]))
    return best if sum(seconds[best]) < MARGIN * sum(seconds[USUAL]) else USUAL
