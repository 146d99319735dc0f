"""Progress of a download by huggingface_hub: bytes of all its files together, told instead of drawn."""

from __future__ import annotations

from threading import Lock
from typing import Any

from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

from besa.progress import Progress


class Download:
    """How much of a download is there; several threads may tell it.

    Args:
        progress: called with (bytes so far, bytes in all, note), from any thread, but never from two at once.
        total: bytes that are to come.
        note: what is downloaded.
    """

    def __init__(self, progress: Progress, total: int, note: str) -> None:
        self._progress, self._total, self._note = progress, total, note
        self._done = -1
        self._lock = Lock()

    def reach(self, done: int) -> None:
        """So many bytes are there: more than before are told, up to the total."""
        with self._lock:
            done = min(done, self._total)
            if self._total and done > self._done:
                self._done = done
                self._progress(done, self._total, self._note)

    @property
    def bars(self) -> type[Any]:
        """The class of bars to give to huggingface_hub: they are not drawn.

        It makes one bar that counts files, and two that count bytes of all files: those from the network, and those in
        the files. The second ends at the total, and the first may be ahead of it, so the farther one counts.
        """
        download, lock = self, Lock()

        class Bar(tqdm):
            def __init__(self, *args: Any, **settings: Any) -> None:
                super().__init__(*args, **settings | {"disable": True})  # type: ignore[no-untyped-call]
                self.in_bytes = settings.get("unit") == "B"

            def update(self, n: float | None = 1) -> None:
                with lock:
                    self.n += n or 0
                if self.in_bytes:
                    download.reach(int(self.n))

        return Bar
