"""Allocation: how many weights may each row, linear and block lose?

Each file holds one method; its settings class is the method, and `allocate` turns a block's problem into zeros per row
that add up exactly.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from besa.allocation.besa import Besa
from besa.allocation.nm import NM
from besa.allocation.problem import Allocated, BlockProblem, RankedLinear, first_tokens
from besa.allocation.sensitivity import Sensitivity
from besa.allocation.structured import Structured
from besa.allocation.uniform import Uniform

Allocation = Annotated[Uniform | Besa | Sensitivity | NM | Structured, Field(discriminator="method")]

__all__ = [
    "NM",
    "Allocated",
    "Allocation",
    "Besa",
    "BlockProblem",
    "RankedLinear",
    "Sensitivity",
    "Structured",
    "Uniform",
    "first_tokens",
]
