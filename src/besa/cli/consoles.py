"""The streams that commands print to, and how they give a result: shown, or as JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.text import Text

from besa.errors import BesaError
from besa.storage.names import printable
from besa.system.processes import launched

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import RenderableType

STDOUT = Path("-")  # as the file of `--json`
# Without markup and emoji codes, as names of models and files have brackets and colons of their own. What is printed
# may be copied, so terminals break lines and nothing else does.
out = Console(soft_wrap=True, markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)
_removers: list[Callable[[], None]] = []  # of what is drawn on the terminal while the work goes on


class _Guarded:
    """A standard stream that passes its failures to `failed`, and escapes characters that it cannot encode."""

    def __init__(self, stream: TextIO, failed: Callable[[OSError], None]) -> None:
        self._stream, self._failed = stream, failed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write to the stream."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # Python writes what is left in buffers when it exits
        os.close(nowhere)
        self._failed(error)


@contextmanager
def removable(remove: Callable[[], None]) -> Iterator[None]:
    """While open, something is drawn on the terminal that `remove` takes away."""
    _removers.append(remove)
    try:
        yield
    finally:
        _removers.remove(remove)


def refuse(sentence: str) -> None:
    """Show the error that ends the command, in place of what is drawn on the terminal."""
    for remove in _removers:
        remove()
    err.quiet = False
    err.print("besa:", Text(printable(" ".join(sentence.split()))), style="red", highlight=False, soft_wrap=True)


def only_errors() -> None:
    """Show nothing but `refuse`: another process shows the rest."""
    sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    err.quiet = True


def guard_streams() -> None:
    """Handle failures of standard output and standard error.

    If standard output fails, the command ends: with a sentence, or silently if the reader of a pipe has closed it. If
    standard error fails, the command goes on without its messages.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would take its number and receive its output
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is not None:
        sys.stdout = _Guarded(sys.stdout, _unwritten)
    if sys.stderr is not None:
        sys.stderr = _Guarded(sys.stderr, lambda error: None)


def _unwritten(error: OSError) -> None:
    if isinstance(error, BrokenPipeError):
        sys.exit(0)
    raise BesaError(f"Standard output cannot be written: {error.strerror}.")


def give(result: BaseModel, shown: RenderableType, json: Path | None) -> None:
    """Print a result; where `--json` names a file, write it there as JSON too, and for `-` print that alone.

    Of several ranks, the first does.

    Raises:
        BesaError: the file cannot be written.
    """
    if launched():
        from besa.system import ranks

        if not ranks.is_first():
            return
    text = result.model_dump_json(indent=2) + "\n"
    if json == STDOUT:
        sys.stdout.write(text)
        return
    if json is not None:
        from besa.storage.writing import write_file

        try:
            write_file(json, text)
        finally:  # a full disk does not take what hours of work found
            out.print(shown)
        return
    out.print(shown)
