"""None: all experts stay."""

from __future__ import annotations

from typing import Literal

from besa.methods.dropping.dropper import Dropper


class NoDropping(Dropper):
    """Drop no experts."""

    method: Literal["none"] = "none"
