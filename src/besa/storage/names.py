"""Names that users give: paths that can be, and names that become parts of others' paths."""

from __future__ import annotations

import re
from pathlib import Path

from besa.errors import BesaError

LONGEST = 64  # characters of a plain name: with what stands around it, still a file's name everywhere
PLAIN = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{LONGEST - 1}}}")


def path_of(given: str | Path) -> Path:
    """What a user names, as a path; whether something is there is another question.

    Raises:
        BesaError: nothing can be there, as the name is too long or no text, or a folder on the way is closed.
    """
    path = Path(given)
    try:
        str(path).encode()  # records hold text
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except UnicodeEncodeError:
        raise BesaError(f"The name {_shown(str(given))} is not UTF-8: rename that file.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BesaError(f"There can be no file {_shown(str(given))} here ({reason}): give another name.") from None
    return path


def check_plain(name: str) -> str:
    """See that a name can be a part of any file's name, and leads into no other folder.

    Raises:
        ValueError: it is not plain.
    """
    if not PLAIN.fullmatch(name):
        raise ValueError(
            f"the name {_shown(name)} is not plain: use at most {LONGEST} letters (a to z), digits, dots, dashes and "
            "underscores, and begin with none of dot and dash"
        )
    return name


def plain(text: str) -> str:
    """A plain name that reminds of a text."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text)[:LONGEST]


def printable(text: str) -> str:
    """The text without control characters, which a terminal obeys and neither HTML nor SVG can hold."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _shown(text: str) -> str:
    """A text in quotes, as much as fits into a sentence."""
    return repr(text if len(text) <= LONGEST else f"{text[:LONGEST]}…")
