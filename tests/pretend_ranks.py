"""Ranks that take turns in one process: what each of several processes would return, without starting them."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar
from unittest.mock import patch

from besa.system import ranks

T = TypeVar("T")


class _Meeting(Exception):  # noqa: N818 - not an error
    """A rank has come to an exchange that the others have not reached."""


def each_rank(count: int, function: Callable[[], T]) -> list[T]:
    """The result of a function on each rank. It may call `ranks.all_of`, and is called anew after every exchange.

    Args:
        count: of ranks.
        function: gives the same result whenever a rank calls it.
    """
    said: list[list[Any]] = []  # at each exchange, by rank

    def until_next(number: int) -> T:
        at = 0

        def all_of(thing: Any) -> list[Any]:
            nonlocal at
            at += 1
            if at <= len(said) and len(said[at - 1]) == count:
                return said[at - 1]
            if at > len(said):
                said.append([])
            said[at - 1].append(thing)
            raise _Meeting

        with ExitStack() as stack:
            stack.enter_context(ranks.together(number, count))
            stack.enter_context(patch.object(ranks, "all_of", all_of))
            return function()

    while True:
        results = []
        for number in range(count):
            try:
                results.append(until_next(number))
            except _Meeting:
                continue
        if results:
            assert len(results) == count, "some ranks wait for others that have ended"
            return results
