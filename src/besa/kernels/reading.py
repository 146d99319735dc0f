"""How a sparse weight is read for one row of x: how many of its bands at once, and how far ahead it is fetched.

Which way is fastest is a matter of a processor's caches and fetchers, which its instruction sets do not tell. So it is
measured once on each machine, and kept in the cache. Every way adds in the same order: results are equal to the bit.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from besa.data.assets import cache_dir
from besa.errors import BesaError
from besa.storage.writing import write_file

ROUNDS = 5
MARGIN = 0.98  # of the usual way's time: what is not faster than this may be chance


class Way(NamedTuple):
    """Bands read at once, and the bytes that are fetched before they are met; zeros stand for the usual ones."""

    bands: int
    ahead: int


Work = Callable[[Way], object]
USUAL = Way(0, 0)
WAYS = [USUAL, *(Way(bands, ahead) for bands in (1, 2, 4) for ahead in (3072, 6144))]


def fastest(name: str, works: Callable[[], Sequence[Work]]) -> Way:
    """The way that takes the least time here: as it was measured before, or is now.

    Args:
        name: of the work and the kernels that do it. What was measured is kept for it and this kind of processor.
        works: gives pieces of work, which read more memory together than the caches hold.
    """
    digest = hashlib.sha256("\0".join((processor(), name)).encode()).hexdigest()[:32]
    path = cache_dir() / "kernels" / f"{digest}.json"
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        for way in WAYS:
            if found == list(way):
                return way
    way = _measured(works())
    with suppress(BesaError):  # no file can be written there: measured again by the next process
        write_file(path, json.dumps(way))
    return way


def processor() -> str:
    """The processor's marketing name, or its architecture if the system does not give the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _measured(works: Sequence[Work]) -> Way:
    """Each way in turn, some times; the least time of each piece counts, as other processes only ever add to it."""
    seconds = {way: [float("inf")] * len(works) for way in WAYS}
    for _ in range(ROUNDS):
        for way, least in seconds.items():
            for i, work in enumerate(works):
                began = time.perf_counter()
                work(way)
                least[i] = min(least[i], time.perf_counter() - began)
    best = min(WAYS, key=lambda way: sum(seconds[way]))
    return best if sum(seconds[best]) < MARGIN * sum(seconds[USUAL]) else USUAL
