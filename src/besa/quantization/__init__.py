"""Quantisation: how many bits do the kept weights have?

`minmax` holds the equations, `clipping` their learned parameters. The settings classes here are the methods.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from besa.errors import BesaError
from besa.quantization.clipping import Clipping, Quantized
from besa.quantization.minmax import Grid
from besa.settings import Learning, Settings


class Quantizer(Settings):
    """Base of all ways to quantise. The defaults describe one that does nothing."""

    @property
    def coding(self) -> MinMax | None:
        """The settings of the codes; None if weights are not quantised."""
        return None

    @property
    def learns_first(self) -> bool:
        """Whether clipping is learned alone, before pruning."""
        return False

    @property
    def learns_jointly(self) -> bool:
        """Whether clipping is learned together with the pruning rates."""
        return False

    @property
    def ranks_again(self) -> bool:
        """Whether weights are ranked once more, in their quantised form."""
        return False

    def clipping_numbers(self, name: str, rows: int, columns: int) -> int:
        """How many numbers the clipping of the linear `name` has."""
        return 0


class NoQuantization(Quantizer):
    """Weights stay in the floating-point format of the model."""

    method: Literal["none"] = "none"


class MinMax(Learning, Quantizer):
    """Weights become N-bit codes on a grid between clipped extremes (eq. 7).

    `batch` is of the steps that learn the clipping first; jointly, it is learned in the steps of the allocation.
    """

    method: Literal["minmax"] = "minmax"
    bits: int = Field(default=4, ge=2, le=8, description="N of eq. 7")
    group: Literal[32, 64, 128] | None = Field(
        default=None, description="columns that share a grid; by default all columns of a row"
    )
    symmetric: bool = Field(default=False, description="the code of zero is the middle one")
    clipping: Literal["joint", "first", "none"] = Field(
        default="joint",
        description="learn it with the allocation, learn it before (as OmniQuant does), or keep the whole range",
    )
    ranks: Literal["weight", "quantized"] = Field(
        default="weight", description="whether the importance of W or of Q(W) decides the pruning order"
    )

    @property
    def coding(self) -> MinMax:
        """The settings themselves."""
        return self

    @property
    def learns_first(self) -> bool:
        """As `clipping` says."""
        return self.clipping == "first"

    @property
    def learns_jointly(self) -> bool:
        """As `clipping` says."""
        return self.clipping == "joint"

    @property
    def ranks_again(self) -> bool:
        """As `ranks` says, unless the whole range is kept."""
        return self.ranks == "quantized" and self.clipping != "none"

    def clipping_numbers(self, name: str, rows: int, columns: int) -> int:
        """Two for each group of a row."""
        return 2 * rows * self.groups(name, columns)

    def groups(self, name: str, columns: int) -> int:
        """The number of groups in a row of the linear `name`.

        Raises:
            BesaError: its columns are no whole number of groups.
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
        """The clipping of a weight, at its start."""
        groups = self.groups(name, w_OI.shape[1])
        return Clipping(w_OI, groups, self.bits, self.symmetric, learned=self.clipping != "none")


Quantization = Annotated[NoQuantization | MinMax, Field(discriminator="method")]

__all__ = ["Clipping", "Grid", "MinMax", "NoQuantization", "Quantization", "Quantized"]
