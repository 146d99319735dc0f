"""Errors and notices for users."""

from __future__ import annotations


class BesaError(Exception):
    """Bad input or an unsupported situation: one sentence says what is wrong and what to do.

    The command line prints the sentence and exits with code 2. Every other exception is a bug in besa.
    """


class ToldError(BesaError):
    """An error whose sentence another rank shows."""


class Interrupted(BaseException):
    """Ctrl-C, with one sentence that says which work was kept."""


class Notice(UserWarning):
    """A warning that a user should know, in one sentence; the work goes on."""
