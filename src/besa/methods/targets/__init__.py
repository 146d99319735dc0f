"""Targets: which block loses how much of the model's sparsity?

Each file holds one method; its settings class is the method. `measure` looks at the dense model, before anything is
pruned, and says which sparsity each block wants; `bounded` keeps that near the model's. `budgets` makes it exact.
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
