"""Dropping: which whole experts of a mixture go before anything else is pruned?

Each file holds one method. Its settings class is the method. `score` says how much each expert matters.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from besa.methods.dropping.frequency import Frequency
from besa.methods.dropping.none import NoDropping
from besa.methods.dropping.reap import Reap

Dropping = Annotated[NoDropping | Reap | Frequency, Field(discriminator="method")]

__all__ = ["Dropping", "Frequency", "NoDropping", "Reap"]
