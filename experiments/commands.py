"""How a script of the experiments is run as a command."""

import sys
from collections.abc import Callable

import typer

from besa.errors import BesaError


def run(command: Callable[..., None]) -> None:
    """Run a command with the arguments of the command line; an error is one sentence, and exit code 2."""
    try:
        typer.run(command)
    except BesaError as error:
        print(f"besa: {error}", file=sys.stderr)
        sys.exit(2)
