"""What a folder may hold that besa reads."""

from __future__ import annotations

from pathlib import Path

from besa.errors import BesaError


def check_regular(folder: Path) -> None:
    """Check that a folder holds no pipe, socket or device: reading one would wait forever.

    Raises:
        BesaError: there is one, or a link to one.
    """
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise BesaError(f"{path} is no regular file: remove it, as besa uses no pipes, sockets or devices.")
