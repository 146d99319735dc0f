"""Quantisation: how many bits do the kept weights have?

`minmax` holds the equations, `clipping` their learned parameters, `searching` clipping that is searched, and
`unrounded` weights that still move. The settings classes here are the methods.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from besa.errors import BesaError
from besa.learning import Learning
from besa.quantization.clipping import Clipping, Quantized
from besa.quantization.minmax import Grid
from besa.quantization.unrounded import Unrounded
from besa.settings import Settings


class Quantizer(Settings):
    """Base of all ways to quantise. The defaults describe one that does nothing.

    Attributes:
        needs_gram: whether quantising needs the Gram matrix of the linears' inputs.
        solver_bytes: bytes that quantising needs for each weight of a linear, besides matrices of its inputs.
    """

    needs_gram: ClassVar[bool] = False
    solver_bytes: ClassVar[int] = 16

    @property
    def coding(self) -> Coding | None:
        """The settings of the codes; None if weights are not quantised."""
        return None

    @property
    def moved(self) -> Moved | None:
        """The settings of codes for weights that may have moved; None if weights must stay where they are."""
        return None

    @property
    def first_batch(self) -> int | Literal["auto"] | None:
        """Sequences of the steps in which clipping is learned alone, before pruning; None if it is not."""
        return None

    @property
    def learns_first(self) -> bool:
        """Whether clipping is learned alone, before pruning."""
        return self.first_batch is not None

    @property
    def learns_jointly(self) -> bool:
        """Whether clipping is learned together with the pruning rates."""
        return False

    @property
    def ranks_again(self) -> bool:
        """Whether weights are ranked once more, in their quantised form."""
        return False

    def gathered_bytes(self, columns: int, item: int) -> int:
        """Bytes that ranks gather of each row of a linear.

        Args:
            columns: of the linear.
            item: bytes of a weight of the model.
        """
        return 0

    def clipping_numbers(self, name: str, rows: int, columns: int) -> int:
        """How many numbers the learned clipping of the linear `name` has."""
        return 0


class NoQuantization(Quantizer):
    """Weights stay in the floating-point format of the model."""

    method: Literal["none"] = "none"


class Coding(Quantizer):
    """Base of those that make codes: N-bit numbers on a grid between the extremes of a group of weights (eq. 7)."""

    bits: int = Field(default=4, ge=2, le=8, description="N of eq. 7")
    group: Literal[32, 64, 128] | None = Field(
        default=None, description="columns that share a grid; by default all columns of a row"
    )
    symmetric: bool = Field(default=False, description="the code of zero is the middle one")

    @property
    def coding(self) -> Coding:
        """The settings themselves."""
        return self

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
        """The whole range."""
        return Clipping(w_OI, self.groups(name, w_OI.shape[1]), self.bits, self.symmetric, learned=False)


class MinMax(Learning, Coding):
    """Weights become codes where they are, with clipped extremes (eq. 7).

    `batch` is of the steps that learn the clipping first; jointly, it is learned in the steps of the allocation.
    """

    method: Literal["minmax"] = "minmax"
    clipping: Literal["joint", "first", "none"] = Field(
        default="joint",
        description="learn it with the allocation, learn it before (as OmniQuant does), or keep the whole range",
    )
    ranks: Literal["weight", "quantized"] = Field(
        default="weight", description="whether the importance of W or of Q(W) decides the pruning order"
    )

    @property
    def first_batch(self) -> int | Literal["auto"] | None:
        """The batch of the clipping steps, if clipping is learned before pruning; else None."""
        return self.batch if self.clipping == "first" else None

    @property
    def learns_jointly(self) -> bool:
        """Whether clipping is learned in the allocation's steps (`clipping=joint`)."""
        return self.clipping == "joint"

    @property
    def ranks_again(self) -> bool:
        """Whether the importance of Q(W), not of W, decides the pruning order (`ranks=quantized`)."""
        return self.ranks == "quantized"

    def clipping_numbers(self, name: str, rows: int, columns: int) -> int:
        """Number of learned parameters: two for each group of a row."""
        return 2 * rows * self.groups(name, columns)

    def clipping_of(self, name: str, w_OI: Tensor) -> Clipping:
        """Clipping of a weight; its γ are learned unless `clipping=none`."""
        groups = self.groups(name, w_OI.shape[1])
        return Clipping(w_OI, groups, self.bits, self.symmetric, learned=self.clipping != "none")


class Moved(Coding):
    """Weights move first and become codes then; those of later columns make up for the rounding of earlier ones.

    Weights that round to zero before anything has moved are the first to be pruned. The mask is fixed from then on: a
    kept weight has no code of zero. Weights that the sweep does not help on held-out tokens are rounded plainly.
    """

    method: Literal["moved"] = "moved"
    clipping: Literal["searched", "none"] = Field(
        default="searched", description="choose among shares of each group's range, or keep the whole range"
    )
    rounding: Literal["sweep", "nearest"] = Field(
        default="sweep", description="column by column, making up for errors, as GPTQ does; or to the nearest code"
    )
    needs_gram: ClassVar[bool] = True
    solver_bytes: ClassVar[int] = 32

    @property
    def moved(self) -> Moved:
        """The settings themselves."""
        return self

    @property
    def ranks_again(self) -> bool:
        """True: weights that round to zero are the first in the pruning order."""
        return True

    def gathered_bytes(self, columns: int, item: int) -> int:
        """The row as the sweep leaves it."""
        return item * columns if self.rounding == "sweep" else 0


Quantization = Annotated[NoQuantization | MinMax | Moved, Field(discriminator="method")]

__all__ = ["Clipping", "Coding", "Grid", "MinMax", "Moved", "NoQuantization", "Quantization", "Quantized", "Unrounded"]
