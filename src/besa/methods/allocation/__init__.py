"""Allocation: how many weights may each row, linear and block lose?

Each file holds one method. Its settings class is the method. `allocate` turns a block's problem into zeros per row that
add up exactly.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from besa.methods.allocation.besa import Besa
from besa.methods.allocation.depth import Depth
from besa.methods.allocation.nm import NM
from besa.methods.allocation.problem import Allocated, BlockProblem, RankedLinear, first_tokens
from besa.methods.allocation.sensitivity import Sensitivity
from besa.methods.allocation.structured import Structured
from besa.methods.allocation.uniform import Uniform

Allocation = Annotated[Uniform | Besa | Sensitivity | NM | Structured | Depth, Field(discriminator="method")]

__all__ = [
    "NM",
    "Allocated",
    "Allocation",
    "Besa",
    "BlockProblem",
    "Depth",
    "RankedLinear",
    "Sensitivity",
    "Structured",
    "Uniform",
    "first_tokens",
]
