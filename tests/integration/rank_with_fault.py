"""The command line on one of several ranks that fails in a way of its own; test_rank_faults.py starts it by torchrun.

Limits in seconds are shorter than they usually are.

Usage: rank_with_fault.py FAULT RANK BLOCK ARGUMENT...: the fault comes on that rank (-1: on all), before it compares
the so many-th block (from 1) with the others.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from torch import Tensor

from besa.cli import main
from besa.errors import BesaError
from besa.system import joining, ranks, watching


def fail() -> NoReturn:
    raise BesaError("The disk is full.")


def err() -> NoReturn:
    raise KeyError("a bug")


def receive(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


FAULTS: dict[str, Callable[[], None]] = {
    "dies": receive(signal.SIGKILL),
    "stops": receive(signal.SIGSTOP),
    "hangs": lambda: time.sleep(600),
    "is interrupted": receive(signal.SIGINT),
    "is terminated": receive(signal.SIGTERM),
    "fails": fail,
    "errs": err,
}


def prepare(fault: str, rank: int, block: int) -> None:
    watching.BEAT, watching.STILL, joining.COMING = 0.2, 4.0, 4.0
    watching.GRACE, watching.TURN, watching.ANSWER = 1.0, 4.0, 1.0
    check, calls = ranks.check_same, 0

    def check_same(name: str, tensors: Sequence[Tensor]) -> None:
        nonlocal calls
        calls += 1
        if calls == block and rank in (ranks.number(), -1):
            FAULTS[fault]()
        check(name, tensors)

    ranks.check_same = check_same


if __name__ == "__main__":
    prepare(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    del sys.argv[1:4]
    main()
