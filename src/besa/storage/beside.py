"""A background thread that runs submitted work one piece after another."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Result = TypeVar("Result")


class Beside(ThreadPoolExecutor):
    """An executor of one thread, which runs what is submitted in order.

    The thread starts with the first work. If Ctrl-C comes at that moment, Python does not know of the thread: at exit
    it would wait for the thread without ever telling it to end. So `submit` tells it.
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
