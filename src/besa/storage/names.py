"""Names from users: possible paths, and plain names that become parts of other paths."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from besa.errors import BesaError

LONGEST = 64  # characters of a plain name, so that a file name around it is valid on every system
PLAIN = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{LONGEST - 1}}}")


def partial_folder(out: Path) -> Path:
    """The folder in which a run keeps its finished blocks until `out` is complete."""
    return out.with_name(f"{out.name}.partial")


def path_of(name: str | Path) -> Path:
    """The path that a user gave; it need not exist.

    Raises:
        BesaError: no file can have this name: it is empty, too long or no UTF-8, or a folder of the path cannot be
            read.
    """
    if name == "":
        raise BesaError("A file name is empty: give one.")
    path = Path(name)
    try:
        str(path).encode()  # records hold text
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except UnicodeEncodeError:
        raise BesaError(f"The name {_shown(str(name))} is not UTF-8: rename that file.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BesaError(
            f"{_shown(str(name))} cannot be used as a file name here ({reason}): give another name."
        ) from None
    return path


def nearest(path: Path) -> Path:
    """The file or folder itself if it exists, else the nearest parent folder that exists."""
    whole = path.absolute()
    return next(place for place in (whole, *whole.parents) if place.exists())


def check_plain(name: str) -> str:
    """Check that a name can be part of any file name and does not lead to another folder.

    Raises:
        ValueError: it is not plain.
    """
    if not PLAIN.fullmatch(name):
        raise ValueError(
            f"the name {_shown(name)} is not plain: use at most {LONGEST} letters (a to z), digits, dots, dashes and "
            "underscores, and do not begin with a dot or a dash"
        )
    return name


def plain(text: str) -> str:
    """A plain name made from a text."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text)[:LONGEST]


def is_path(model: str) -> bool:
    """Whether the name of a model can only be a path; a name like ``a/b`` may also be a Hugging Face id."""
    return model.count("/") > 1 or model.startswith((".", "~", "/"))


def pinned(model: str, revision: str | None) -> str:
    """What to write to have the same model again.

    Args:
        model: Hugging Face id, path, or another name.
        revision: its commit, None where there is none.
    """
    return f"{model}@{revision}" if revision and not is_path(model) else model


def printable(text: str) -> str:
    """The text without control characters: terminals obey them, and HTML and SVG cannot hold them."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def visible(text: str) -> str:
    """The text with control characters written out, such as ESC as four characters, but for newlines and tabs."""
    return "".join(
        _written_out(character) if unicodedata.category(character) == "Cc" else character for character in text
    )


def _written_out(control: str) -> str:
    return control if control in "\n\t" else control.encode("unicode_escape").decode()


def _shown(text: str) -> str:
    """A text in quotes, shortened to fit into a sentence."""
    return repr(text if len(text) <= LONGEST else f"{text[:LONGEST]}…")
