"""What every choice of a recipe has in common: strict, immutable settings that read from and write to YAML."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of all recipe parts: unknown keys are errors, values cannot change after they were checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
