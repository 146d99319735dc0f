"""Whether weights are fetched past the outer caches, measured once on a machine.

A weight is read once in a step, and would evict from the caches what the rest of the step needs. Some processors
fetch past them as fast as into them; others are three times slower (docs/log.md). Results do not depend on it.
"""

from __future__ import annotations

import ctypes
import time
from functools import cache

import torch

from besa.kernels.build import load, runnable
from besa.kernels.once import once

SOURCE = "dense.cpp"  # whose kernels measure it
WAYS = ("singles", "eights")  # of its kernels: AVX-512, AVX2
SHAPE = (8192, 2048)  # of a weight in float32: more than the caches of a core hold
ROUNDS = 5
WORTH = 1.25  # a step gains some hundredths by it: reading may cost so many times as much, which is no chance


@cache
def past_caches() -> bool:
    """Whether this machine fetches past the outer caches about as fast as into them."""
    ways, kernels = runnable(SOURCE, WAYS), load(SOURCE)
    if not ways or kernels is None:
        return False
    subject = f"whether weights are fetched past the outer caches {kernels._name}"
    found: bool = once(subject, [], lambda found: isinstance(found, bool), lambda: _measured(ways[0]))
    return found


def _measured(way: str) -> bool:
    """Time both in turn, several times; the least time counts, as other processes can only add to it."""
    kernels = load(SOURCE)
    assert kernels is not None
    multiply = kernels[f"dense_float32_{way}"]
    w_OI, x_I, y_O = torch.ones(SHAPE), torch.ones(SHAPE[1]), torch.empty(SHAPE[0])
    seconds = {True: float("inf"), False: float("inf")}
    for _ in range(ROUNDS):
        for past in seconds:
            numbers = (w_OI.data_ptr(), x_I.data_ptr(), 1, SHAPE[1], SHAPE[0], y_O.data_ptr(), past, 1)
            began = time.perf_counter()
            multiply(*(ctypes.c_int64(number) for number in numbers))
            seconds[past] = min(seconds[past], time.perf_counter() - began)
    return seconds[True] < WORTH * seconds[False]
