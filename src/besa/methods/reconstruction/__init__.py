"""Reconstruction: may the kept weights move to make up for the pruned ones?

Each file holds one method; its settings class is the method, and `rebuild` is a pure function from a dense weight, the
statistics of its input and the zeros each row is to have, to the weight as it will be written. Where `group` is given,
the ranks and the zeros of a row take as many of every so many consecutive columns: masks chosen anew keep to that.
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
