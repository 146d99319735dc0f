"""Quantisation: how many bits does a weight keep?

`minmax` holds the equations, `clipping` what is learned of them; the settings classes here are the methods.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from besa.errors import BesaError
from besa.quantization.clipping import Clipping, Quantized
from besa.quantization.minmax import Grid
from besa.settings import Settings


class Quantizer(Settings):
    """Base of all ways to quantise; by default one that does nothing."""

    @property
    def coding(self) -> MinMax | None:
        """What makes codes of weights; None where they stay what they are."""
        return None

    @property
    def learns_first(self) -> bool:
        """Whether clipping is learned by itself, before anything is pruned."""
        return False

    @property
    def learns_jointly(self) -> bool:
        """Whether clipping is learned together with what the allocation learns."""
        return False


class NoQuantization(Quantizer):
    """Weights stay in the floating-point format of the model."""

    method: Literal["none"] = "none"


class MinMax(Quantizer):
    """Weights become N-bit codes on a grid between clipped extremes (eq. 7)."""

    method: Literal["minmax"] = "minmax"
    bits: int = Field(default=4, ge=2, le=8, description="N of eq. 7")
    group: Literal[32, 64, 128] | None = Field(
        default=None, description="columns that share a grid; by default all of a row do"
    )
    symmetric: bool = Field(default=False, description="zero has the code in the middle")
    clipping: Literal["joint", "first", "none"] = Field(
        default="joint",
        description="learn it together with the allocation, before it (as OmniQuant does), or take the whole range",
    )
    ranks: Literal["weight", "quantized"] = Field(
        default="weight", description="whose importance decides the pruning order: of W or of Q(W)"
    )

    @property
    def coding(self) -> MinMax:
        """Itself."""
        return self

    @property
    def learns_first(self) -> bool:
        """As `clipping` says."""
        return self.clipping == "first"

    @property
    def learns_jointly(self) -> bool:
        """As `clipping` says."""
        return self.clipping == "joint"

    def groups(self, name: str, columns: int) -> int:
        """How many groups a row of the linear `name` has.

        Raises:
            BesaError: its rows are no whole number of groups.
        """
        if self.group is None:
            return 1
        if columns % self.group:
            raise BesaError(
                f"{name} has {columns} columns, which are no whole number of groups of {self.group}: choose another "
                "quantization.group, or leave the linear out with --skip."
            )
        return columns // self.group

    def clipping_of(self, name: str, w_OI: Tensor) -> Clipping:
        """Where the clipping of a weight starts."""
        groups = self.groups(name, w_OI.shape[1])
        return Clipping(w_OI, groups, self.bits, self.symmetric, learned=self.clipping != "none")


Quantization = Annotated[NoQuantization | MinMax, Field(discriminator="method")]

__all__ = ["Clipping", "Grid", "MinMax", "NoQuantization", "Quantization", "Quantized"]
