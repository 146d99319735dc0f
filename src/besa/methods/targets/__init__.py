"""Targets: how many weights may each block lose?

Each file holds one method. Its settings class is the method. `measure` runs the dense model before anything is pruned
and returns a sparsity for each block. `bounded` keeps these near the model's sparsity. `budgets` makes them exact.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from besa.methods.targets.bounded import Bounded
from besa.methods.targets.loss_sensitivity import LossSensitivity
from besa.methods.targets.owl import Owl
from besa.methods.targets.search import Search
from besa.methods.targets.uniform import UniformTargets

Targets = Annotated[UniformTargets | Owl | LossSensitivity | Search, Field(discriminator="method")]

__all__ = ["Bounded", "LossSensitivity", "Owl", "Search", "Targets", "UniformTargets"]
