"""Distilling: may the whole pruned model learn to predict what the dense model predicts?

Each file holds one method, or a part of one. Its settings class is the method. A method changes a `student`, which
learns from a `training_set`; the dense model is the teacher. `trainer` is the work of `kl`, and `states` is how it goes
on after an interruption.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from besa.methods.distilling.kl import MaskedKL
from besa.methods.distilling.none import NoDistilling
from besa.methods.distilling.student import Distilled, Student
from besa.methods.distilling.training_set import TrainingSet

Distilling = Annotated[NoDistilling | MaskedKL, Field(discriminator="method")]

__all__ = ["Distilled", "Distilling", "MaskedKL", "NoDistilling", "Student", "TrainingSet"]
