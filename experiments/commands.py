"""How a script of the experiments is run as a command."""

import sys
from collections.abc import Callable

import typer

from besa.errors import BesaError, Interrupted


def run(command: Callable[..., None]) -> None:
    """Run a command with the arguments of the command line; an error or Ctrl-C is one sentence, exit code 2 or 130."""
    try:
        typer.run(command)
    except BesaError as error:
        print(f"besa: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as interruption:
        print(f"besa: {interruption}", file=sys.stderr)
        sys.exit(130)
