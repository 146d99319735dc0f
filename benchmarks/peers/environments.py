"""Environments of Python packages that are measured beside besa: made once each, in a folder of the user's cache."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from besa.data.assets import cache_dir
from besa.errors import BesaError


def environment(package: str, release: str) -> Path:
    """The Python of an environment that holds this release of a package; it is made if it is not there.

    torch goes in first, in besa's own version; the package brings its own versions of everything else.

    Raises:
        BesaError: the packages cannot be installed.
    """
    home = cache_dir() / "peers" / f"{package}-{release}"
    python, ready = home / "env" / "bin" / "python", home / "ready"
    if not ready.exists():
        _call(sys.executable, "-P", "-m", "venv", "--clear", home / "env")
        _call(python, "-m", "pip", "install", f"torch=={version('torch').partition('+')[0]}")
        _call(python, "-m", "pip", "install", f"{package}=={release}")
        ready.touch()
    return python


def _call(*command: object) -> None:
    """Run a step of the installation, with its output shown and without this program's own paths.

    Raises:
        BesaError: it fails.
    """
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        subprocess.run([str(part) for part in command], check=True, env=own)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BesaError(f"The environment cannot be made: {error}.") from None
