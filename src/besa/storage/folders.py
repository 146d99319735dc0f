"""Check folders before besa reads them."""

from __future__ import annotations

import stat
from pathlib import Path

from besa.errors import BesaError


def check_regular(folder: Path) -> None:
    """Check that a folder holds no pipe, socket or device: reading one would wait forever.

    Files may come and go meanwhile, as another run writes there.

    Raises:
        BesaError: there is one, or a link to one.
    """
    for path in sorted(folder.iterdir()):
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:  # gone, or a link to nothing
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise BesaError(f"{path} is no regular file: remove it, as besa uses no pipes, sockets or devices.")
