"""Distilling: the pruned model as a whole learns to predict what the dense model predicts.

`distiller` is the base of the methods, `kl` holds the one that learns, `study` what it learns from, and `course` its
work.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from besa.methods.distilling.distiller import Distilled, NoDistilling, Pupil
from besa.methods.distilling.kl import MaskedKL
from besa.methods.distilling.study import Study

Distilling = Annotated[NoDistilling | MaskedKL, Field(discriminator="method")]

__all__ = ["Distilled", "Distilling", "MaskedKL", "NoDistilling", "Pupil", "Study"]
