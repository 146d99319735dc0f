"""A thread that works beside the one that asks for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")


class Beside(ThreadPoolExecutor):
    """One thread, which does what is submitted in turn.

    It starts with the first work. If Ctrl-C comes in that moment, Python does not know of the thread: at the end it
    would wait for the thread without ever telling it to end. So it is told here.
    """

    def __init__(self) -> None:
        super().__init__(max_workers=1)

    def submit(self, work: Callable[Given, Result], /, *args: Given.args, **kwargs: Given.kwargs) -> Future[Result]:
        """Begin work; see `ThreadPoolExecutor.submit`."""
        try:
            return super().submit(work, *args, **kwargs)
        except KeyboardInterrupt:
            self.shutdown(wait=False)
            raise
