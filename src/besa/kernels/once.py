"""Measurements that are taken once on a machine and cached, so that all its processes choose alike."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from besa.data.assets import cache_dir
from besa.kernels.defaults import defaults
from besa.kernels.processor import processor


def once(subject: str, depends_on: Sequence[str], allowed: Callable[[Any], bool], measure: Callable[[], Any]) -> Any:
    """Return the cached measurement, or measure now and cache it.

    The first process that writes the cache decides for all later ones.

    Args:
        subject: what is measured, in words.
        depends_on: what else decides the result, such as a digest of the kernels. The processor always does.
        allowed: whether something that was kept can be the result; if not, the file is damaged and measured again.
        measure: finds the result, in JSON types.
    """
    identity = "\0".join((subject, processor(), *depends_on))
    path = cache_dir() / "kernels" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
    before = _read(path, allowed)
    if before is not None:
        return before
    with defaults():
        found = measure()
    with suppress(OSError):  # where no file can be written, the result holds for this process
        _keep(path, {"subject": subject, "processor": processor(), "found": found}, allowed)
    after = _read(path, allowed)
    return found if after is None else after


def _read(path: Path, allowed: Callable[[Any], bool]) -> Any:
    """The result in a file; None if there is none, or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["found"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return found if allowed(found) else None


def _keep(path: Path, result: dict[str, Any], allowed: Callable[[Any], bool]) -> None:
    """Write a file as a whole, unless another process was first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        json.dump(result, file)
    written = Path(file.name)
    try:
        if path.exists() and _read(path, allowed) is None:
            written.replace(path)
            return
        try:
            os.link(written, path)
        except FileExistsError:
            pass
        except OSError:  # this file system knows no links
            written.replace(path)
    finally:
        written.unlink(missing_ok=True)
