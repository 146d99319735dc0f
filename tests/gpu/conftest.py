"""The tests of `make test-gpu`, on a real GPU: nothing of tests/conftest.py holds, so Triton compiles.

BESA_TEST_DEVICE names another device to run them on: ``cpu``, or ``pretend`` (tests/pretend.py). Then they show that
the tests themselves work.
"""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

DEVICE = os.environ.get("BESA_TEST_DEVICE", "cuda")
ABSENT = DEVICE == "cuda" and not torch.cuda.is_available()
if DEVICE == "pretend":  # not beside a GPU, whose place it would take in torch.accelerator
    from tests import pretend
TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if ABSENT:
        config.hook.pytest_deselected(items=items[:])
        items.clear()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if ABSENT and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if ABSENT:
        terminalreporter.write_line("There is no CUDA device that torch can use here: no test of tests/gpu was run.")


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE, 0) if DEVICE != "cpu" else torch.device("cpu")


@pytest.fixture
def waits() -> Callable[[], Any]:
    """Opens a count of the moments in which the host waits for the device."""

    @contextmanager
    def counted() -> Iterator[list[str]]:
        found: list[str] = []
        before = pretend.counts.syncs.copy() if DEVICE == "pretend" else Counter()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                if DEVICE == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        found += [str(one.message) for one in said if "synchronizing CUDA operation" in str(one.message)]
        if DEVICE == "pretend":
            found += (pretend.counts.syncs - before).elements()

    return counted
