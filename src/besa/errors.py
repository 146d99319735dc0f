"""What a user is meant to read when something is not as it should be."""

from __future__ import annotations


class BesaError(Exception):
    """Bad input or a refused situation, told in one sentence that says what is wrong and what to do.

    The command line prints the sentence and leaves with exit code 2; every other exception is a bug in besa.
    """


class Interrupted(BaseException):
    """Ctrl-C, with a sentence on what was kept."""


class Notice(UserWarning):
    """Something that a user should know and that stops nothing, in one sentence."""
