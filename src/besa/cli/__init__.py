"""The command line: parse, call the API, show. The only part of besa that prints."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, Any, TextIO

import typer
from rich.text import Text

from besa.cli import helping, interrupting, measuring, pruning, running, several, sharing, studying
from besa.cli.consoles import err, guard_streams, out, refuse
from besa.errors import BesaError, Interrupted, Notice, ToldError
from besa.version import __version__

UsageError: Any = typer.BadParameter.__base__  # the base of all usage errors; typer exports only this child of it
app = typer.Typer(pretty_exceptions_enable=False)
for part in (pruning, studying, measuring, running, sharing, helping):
    app.add_typer(part.commands)


def _print_version(asked: bool) -> None:
    """Print the version instead of running a command."""
    if asked:
        out.print(f"besa {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def besa(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Prune large language models block by block, with learned and exact sparsity, and measure the result."""


def main() -> None:
    """Entry point of `besa`: a sentence and exit code 2 for bad input, 130 after Ctrl-C."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = _note
    guard_streams()
    interrupting.begin()
    try:
        _check_text(sys.argv[1:])
        with several.together():
            _run(sys.argv[1:])
    except ToldError:
        several.leave(2)
    except BesaError as error:
        refuse(str(error))
        several.leave(2)
    except Interrupted as interruption:
        err.print("besa:", Text(str(interruption)), highlight=False, soft_wrap=True)
        several.leave(130)
    except KeyboardInterrupt:
        err.print("besa:", Text(interrupting.sentence()), highlight=False, soft_wrap=True)
        several.leave(130)


def _run(arguments: list[str]) -> None:
    """Run a command.

    Raises:
        BesaError: there is no such command, its arguments are wrong, or a GPU has too little memory.
        KeyboardInterrupt: Ctrl-C.
    """
    try:
        code = app(arguments or ["--help"], prog_name="besa", standalone_mode=False)
    except UsageError as error:
        command = "besa" if error.ctx is None else error.ctx.command_path
        message = error.format_message().rstrip(".").replace(": Value error, ", ": ")
        raise BesaError(f"{message}{' See' if message.endswith('?') else ': see'} `{command} --help`.") from None
    except typer.Abort:
        raise KeyboardInterrupt from None
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which takes a while to import
            raise
        raise BesaError(
            "The GPU has too little free memory: see `besa plan` for what a run needs, end what else uses the GPU, or "
            "take a smaller --batch or --activation-budget."
        ) from error
    if code == 130:  # typer's code for Ctrl-C
        raise KeyboardInterrupt


def _check_text(arguments: list[str]) -> None:
    """Refuse arguments that are no UTF-8, which no record can hold: on Linux they may be any bytes."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise BesaError(f"The argument {argument!r} is not UTF-8: rename the file or change the text.") from None


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a notice as one line, and any other warning as Python shows it."""
    if issubclass(category, Notice):
        err.print("besa:", Text(str(message)), style="yellow", highlight=False, soft_wrap=True)
    else:
        err.print(
            Text(warnings.formatwarning(message, category, filename, lineno, line)),
            highlight=False,
            soft_wrap=True,
            end="",
        )
