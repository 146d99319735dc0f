"""The base of all parts of a recipe: strict, immutable settings that are read from and written to YAML."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

LARGEST = 2**31 - 1  # largest integer of a setting, so that counts fit into 32 bits
LARGEST_FLOAT = 1e30  # of other settings, so that they fit into a float32


class Settings(BaseModel):
    """Base of all recipe parts. Unknown keys are errors. Values cannot change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _countable(self) -> Self:
        for name, value in self:
            if isinstance(value, int) and value > LARGEST:
                raise ValueError(f"{name} is larger than {LARGEST:,}: ask for less")
            if isinstance(value, float) and value > LARGEST_FLOAT:
                raise ValueError(f"{name} is larger than {LARGEST_FLOAT:g}: ask for less")
        return self
