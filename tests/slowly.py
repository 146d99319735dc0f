"""Cases of a test of which some are left to `make test-slow`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some_slow(cases: Iterable[Any], slow: Collection[Any]) -> list[Any]:
    """All cases; those in `slow`, which others resemble, take long and are marked so. Tuples are several arguments."""
    listed = list(cases)
    assert all(one in listed for one in slow), f"{slow} are not all among {listed}"
    return [_slow(case) if case in slow else case for case in listed]


def _slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
