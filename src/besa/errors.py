"""The one error a user is meant to read."""

from __future__ import annotations


class BesaError(Exception):
    """Bad input or a refused situation, told in one sentence that says what is wrong and what to do.

    The command line prints the sentence and leaves with exit code 2; every other exception is a bug in besa.
    """


class Interrupted(BaseException):
    """Ctrl-C, with a sentence on what was kept."""
