"""A dense matrix in memory as codes of eight bits: the head and the embeddings, which have no zeros to leave out.

Shape suffixes: O rows, I columns, N rows that are looked up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from besa.errors import BesaError
from besa.quantization import Clipping
from besa.storage.formats.bitmask import FLOATS, is_positive

BITS = 8
MIDDLE = 2 ** (BITS - 1)  # the code of zero, before it is taken off
PANEL = 1 << 24  # weights coded or decoded at a time, to bound temporary memory


@dataclass(frozen=True, eq=False)
class RowCodes:
    """A matrix (O, I) whose rows have one symmetric grid each: a number is its code times the step of its row.

    Attributes:
        codes_OI: int8.
        steps_O1: h of eq. 7, in the dtype of the matrix.
    """

    codes_OI: Tensor
    steps_O1: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense matrix."""
        return self.steps_O1.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.codes_OI.nbytes + self.steps_O1.nbytes

    def rows(self, places_N: Tensor) -> Tensor:
        """Some rows, dense (N, I).

        Raises:
            IndexError: a place is negative, or there is no such row.
        """
        return self.codes_OI.index_select(0, places_N).to(self.dtype) * self.steps_O1.index_select(0, places_N)

    def unpack(self, rows: slice = slice(None)) -> Tensor:
        """Rows that follow each other, dense (O, I), multiplied in their dtype."""
        dense_OI = self.codes_OI[rows].to(self.dtype)
        return dense_OI.mul_(self.steps_O1[rows])

    def check(self, name: str) -> None:
        """Check that the tensors fit each other and that the steps are positive.

        Args:
            name: of the matrix, for the message.

        Raises:
            BesaError: they do not, or are not.
        """
        flaw = ""
        shapes = self.codes_OI.dim() == 2 and self.steps_O1.shape == (len(self.codes_OI), 1)
        if not shapes or self.codes_OI.dtype != torch.int8 or self.dtype not in FLOATS or not self.codes_OI.numel():
            flaw = "its codes and scales do not fit"
        elif not is_positive(self.steps_O1):
            flaw = "its scales are not all positive numbers"
        if flaw:
            raise BesaError(f"The matrix {name} in codes is damaged: {flaw}; pack it again.")


def pack(w_OI: Tensor) -> RowCodes:
    """A dense matrix as codes on the grids of eq. 7 that cover each row, symmetric, without clipping.

    A number differs from its code's by half a step at most; those at the end of a row by 3/4, as the step is rounded to
    the dtype of the matrix.

    Args:
        w_OI: float32, bfloat16 or float16.

    Raises:
        BesaError: it has another dtype.
    """
    if w_OI.dtype not in FLOATS:
        raise BesaError(f"A matrix of {w_OI.dtype} cannot be coded: only float32, bfloat16 and float16 can.")
    coded = [_coded(panel_OI) for panel_OI in w_OI.split(max(1, PANEL // w_OI.shape[1]))]
    codes_OI, steps_O1 = (torch.cat(parts) for parts in zip(*coded, strict=True))
    return RowCodes(codes_OI, steps_O1)


def _coded(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and steps of some rows."""
    coded = Clipping(w_OI, 1, BITS, symmetric=True, learned=False).quantized(w_OI.dtype)
    return (coded.codes_OI.to(torch.int16) - MIDDLE).to(torch.int8), coded.grid.step_OG.to(w_OI.dtype)
