"""Reconstruction: may the kept weights of a linear change to compensate for the pruned ones?

Each file holds one method. Its settings class is the method. `rebuild` is a pure function: from a dense weight, the
statistics of its input and the zeros of each row, it computes the weight as it will be written. If `group` is given,
every group of so many consecutive columns loses the same number of weights. Methods that choose a new mask keep to it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from besa.methods.reconstruction.admm import ADMM
from besa.methods.reconstruction.cg import ConjugateGradient
from besa.methods.reconstruction.none import NoReconstruction
from besa.methods.reconstruction.obs_update import OBSUpdate

Reconstruction = Annotated[NoReconstruction | OBSUpdate | ConjugateGradient | ADMM, Field(discriminator="method")]

__all__ = ["ADMM", "ConjugateGradient", "NoReconstruction", "OBSUpdate", "Reconstruction"]
