"""Importance: which weights of a row matter least?

Each file holds one criterion. Its settings class is the method. `score` is a pure function of the weight and of the
statistics of the linear's input. A new criterion is one more file and one more name in the union below.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from besa.methods.importance.magnitude import Magnitude
from besa.methods.importance.obs import OBS
from besa.methods.importance.ria import RIA
from besa.methods.importance.wanda import Wanda

Importance = Annotated[Magnitude | Wanda | OBS | RIA, Field(discriminator="method")]

__all__ = ["OBS", "RIA", "Importance", "Magnitude", "Wanda"]
