"""Where commands print, and where they put what is asked for as JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

from besa.errors import BesaError

if TYPE_CHECKING:
    from pydantic import BaseModel

out = Console()
err = Console(stderr=True)


class _Guarded:
    """A standard stream whose failures come as what `failed` makes of them; what it cannot encode is escaped."""

    def __init__(self, stream: TextIO, failed: Callable[[OSError], None]) -> None:
        self._stream, self._failed = stream, failed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of the stream."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """As of the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # for what is left in buffers, which Python writes at its end
        os.close(nowhere)
        self._failed(error)


def guard_streams() -> None:
    """See to it that standard output and error can be written, or say why not.

    Work ends when its result cannot be written: with a sentence, or in silence where a pipe's reader has had enough. It
    goes on when only what is told on the way cannot be.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file to be opened would take its place, and get what is meant for it
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is not None:
        sys.stdout = _Guarded(sys.stdout, _unwritten)
    if sys.stderr is not None:
        sys.stderr = _Guarded(sys.stderr, lambda error: None)


def _unwritten(error: OSError) -> None:
    if isinstance(error, BrokenPipeError):
        sys.exit(0)
    raise BesaError(f"Standard output cannot be written: {error.strerror}.")


def keep(result: BaseModel, file: Path | None) -> None:
    """Write a result as JSON, where `--json` asks for it.

    Raises:
        BesaError: the file cannot be written.
    """
    from besa.storage.writing import write_file

    if file is not None:
        write_file(file, result.model_dump_json(indent=2) + "\n")
