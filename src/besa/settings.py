"""What every choice of a recipe has in common: strict, immutable settings that read from and write to YAML."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

LARGEST = 2**31 - 1  # whole number that a setting can be: what is counted here fits in 32 bits


class Settings(BaseModel):
    """Base of all recipe parts: unknown keys are errors, values cannot change after they were checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _countable(self) -> Self:
        for name, value in self:
            if isinstance(value, int) and value > LARGEST:
                raise ValueError(f"{name} is larger than {LARGEST:,}: ask for less")
        return self
