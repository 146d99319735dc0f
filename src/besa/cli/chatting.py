"""A chat in the terminal, or with questions that are piped in, one a line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from besa.cli.consoles import err, out
from besa.errors import BesaError
from besa.storage.names import visible

if TYPE_CHECKING:
    from besa.runtime.conversation import Conversation

END = "/exit"


def say(word: str) -> None:
    """Print a part of an answer; a console of rich would print it again later if Ctrl-C stopped it on the way.

    A terminal would obey control characters, so they are written out there.
    """
    print(visible(word) if sys.stdout.isatty() else word, end="", flush=True)


def chat(conversation: Conversation) -> None:
    """Answer the lines of standard input, until it ends or says /exit.

    In a terminal, each line is asked for, Ctrl-C stops an answer, and a question that cannot be answered is refused
    while the conversation goes on. Otherwise only the answers are printed.

    Raises:
        BesaError: a question that was piped in cannot be answered, there is none, or it is no UTF-8.
        KeyboardInterrupt: Ctrl-C without a terminal.
    """
    if sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty():
        _in_terminal(conversation)
        return
    asked = False
    for question in _piped():
        conversation.ask(question, say)
        out.print()
        asked = True
    if not asked:
        raise BesaError("There is nothing to answer: give --prompt, or questions on standard input, one a line.")


def _piped() -> Iterator[str]:
    """The lines of standard input that hold a question.

    Raises:
        BesaError: standard input is no text.
    """
    try:
        for line in sys.stdin or ():
            if line.strip() == END:
                return
            if line.strip():
                yield line.rstrip("\r\n")
    except UnicodeDecodeError:
        raise BesaError("Standard input is no UTF-8: write the questions as text.") from None


def _in_terminal(conversation: Conversation) -> None:
    """See `chat`."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lets `input` edit lines and go back to earlier ones

    err.print(f"Ctrl-C stops an answer; {END} or Ctrl-D ends the chat.", style="dim", highlight=False)
    while True:
        try:
            question = input("> ")
        except EOFError:
            out.print()
            return
        except KeyboardInterrupt:
            out.print()
            err.print(f"{END} or Ctrl-D ends the chat.", style="dim", highlight=False)
            continue
        if question.strip() == END:
            return
        if not question.strip():
            continue
        try:
            conversation.ask(question, say)
        except BesaError as error:
            err.print("besa:", Text(str(error)), style="red", highlight=False, soft_wrap=True)
            continue
        except KeyboardInterrupt:
            pass
        out.print()
