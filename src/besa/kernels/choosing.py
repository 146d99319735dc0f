"""Which of several ways to compute a product is the fastest here: measured once on a machine, then read from the cache.

The ways differ in the rounding of their sums. A choice is therefore kept in a file, and the first file stays: all
processes of a machine choose alike.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path

import torch

from besa.data.assets import cache_dir
from besa.kernels.processor import processor

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
        prepare: makes an example, and for each way what gives the work for a number of rows.
    """
    if len(ways) == 1:
        return [*ways] * len(COUNTS)
    texts = [(resources.files("besa.kernels") / source).read_bytes() for source in sources]
    threads = torch.get_num_threads()
    identity = [subject, processor(), torch.__version__, str(threads), *ways, *map(str, COUNTS)]
    digest = hashlib.sha256("\0".join(identity).encode() + b"\0".join(texts)).hexdigest()[:32]
    path = cache_dir() / "choices" / f"{digest}.json"
    found = _read(path, ways)
    if found is None:
        measured = _measured(prepare())
        _keep(path, {"subject": subject, "processor": processor(), "threads": threads, "fastest": measured})
        found = _read(path, ways) or measured  # another process may have been first
    return found


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


def _read(path: Path, ways: Sequence[str]) -> list[str] | None:
    """The choices in a file; None if there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["fastest"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    whole = isinstance(found, list) and len(found) == len(COUNTS) and all(name in ways for name in found)
    return found if whole else None


def _keep(path: Path, result: dict[str, object]) -> None:
    """Write a file unless there is one; where nothing can be written, the choice holds for this process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            json.dump(result, file)
        try:
            os.link(file.name, path)
        finally:
            Path(file.name).unlink()
    except OSError:
        return
