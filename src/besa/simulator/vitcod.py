"""Cycles of the ViTCoD accelerator (You et al., HPCA 2023) for a pruned weight: section 4.5, appendix B of the paper.

Columns of the weight with many non-zeros go to the denser engine, which multiplies them whole, zeros included. The
non-zeros of all other columns go to the sparser engine. Both engines work at the same time, on lines of multipliers
that are divided between them by work, and add to outputs that stay in the array. The cycles therefore depend only on
the number of non-zeros in each column.

Shape suffixes: C columns (input channels) of a weight or of a piece of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Self

from pydantic import Field, model_validator
from torch import Tensor

from besa.settings import Settings

KIB = 1024


class Accelerator(Settings):
    """Settings of the accelerator; the defaults are ViTCoD's.

    Attributes:
        lines: lines of multipliers, divided between the engines.
        multipliers: in a line; each multiplies and accumulates once per cycle.
        threshold: where the search starts; a column is dense if more than this share of its rows is non-zero.
        threshold_step: step of the search.
        least_dense: the threshold falls if at most this share of the non-zeros is in dense columns.
        most_dense: the threshold rises if at least this share is; between both, the search ends.
        tries: thresholds to try, at most.
        clock_hz: cycles per second.
        bandwidth: bytes per second of the memory interface.
        weight_bits: bits of a weight in memory.
        activation_bits: bits of an input or output in memory.
        accumulator_bits: bits of an output while it is summed up.
        weight_buffer: bytes; ViTCoD's buffers for Q and K.
        input_buffer: bytes; ViTCoD's buffer for V.
        index_buffer: bytes.
        output_buffer: bytes.
    """

    lines: int = Field(default=64, ge=2)
    multipliers: int = Field(default=64, ge=1)
    threshold: Decimal = Decimal("0.5")  # decimals: a float could decide a tie
    threshold_step: Decimal = Decimal("0.1")
    least_dense: Decimal = Decimal("0.4")
    most_dense: Decimal = Decimal("0.6")
    tries: int = Field(default=5, ge=1)
    clock_hz: float = Field(default=500e6, gt=0)
    bandwidth: float = Field(default=76.8 * 2**30, gt=0)
    weight_bits: int = Field(default=8, ge=1)
    activation_bits: int = Field(default=8, ge=1)
    accumulator_bits: int = Field(default=32, ge=1)
    weight_buffer: int = Field(default=2 * 53 * KIB, ge=0)
    input_buffer: int = Field(default=53 * KIB, ge=0)
    index_buffer: int = Field(default=20 * KIB, ge=0)
    output_buffer: int = Field(default=108 * KIB, ge=4)

    @model_validator(mode="after")
    def _holds_an_output(self) -> Self:
        if 8 * self.output_buffer < self.accumulator_bits:
            raise ValueError("output_buffer is smaller than one output of accumulator_bits")
        return self

    @property
    def array(self) -> int:
        """Multiply-accumulates per cycle."""
        return self.lines * self.multipliers


@dataclass(frozen=True)
class Cycles:
    """Cycles of a weight for one input vector, with all data on the chip.

    Attributes:
        published: by the formula behind the paper's Table 4.
        corrected: the same formula with the rows of the weight instead of its columns.
        best: corrected, with the best threshold for each piece: one that no column reaches. Only the sparser engine
            then works, on non-zeros alone; every column in the denser engine would add zeros.
        bound: non-zeros over multipliers, the minimum for an array of this size. `best` is larger only because each
            piece is rounded up.
        denser: of the corrected cycles, those in which the denser engine works.
        sparser: of the corrected cycles, those in which the sparser engine works.
        dense_columns: columns in the denser engine, with the corrected formula.
        rest: non-zeros in the sparser engine, with the corrected formula.
    """

    published: int
    corrected: int
    best: int
    bound: int
    denser: int
    sparser: int
    dense_columns: int
    rest: int


def cycles(nnz_C: Tensor, rows: int, accelerator: Accelerator) -> Cycles:
    """Cycles of a weight for one input vector.

    A weight with more columns than rows is cut into pieces as wide as it is high, which are computed one by one.

    Args:
        nnz_C: non-zeros of each column (C), integers.
        rows: R of the weight.
        accelerator: its settings.
    """
    published = corrected = best = denser = sparser = dense_columns = rest = 0
    for piece_C in nnz_C.cpu().long().split(rows):
        tried = _searched(piece_C, rows, accelerator)
        published += min(max(_busy(split, rows, len(piece_C), accelerator)) for split in tried)
        fastest = min(tried, key=lambda split: max(_busy(split, rows, rows, accelerator)))
        busy = _busy(fastest, rows, rows, accelerator)
        corrected += max(busy)
        denser += busy[0]
        sparser += busy[1]
        dense_columns += fastest.columns
        rest += fastest.rest
        best += _divided_up(int(piece_C.sum()), accelerator.array)
    bound = _divided_up(int(nnz_C.sum()), accelerator.array)
    return Cycles(published, corrected, best, bound, denser, sparser, dense_columns, rest)


@dataclass(frozen=True)
class Split:
    """How the columns of a piece are divided between the engines.

    Attributes:
        columns: G, the number of columns in the denser engine.
        rest: non-zeros in the other columns, for the sparser engine.
    """

    columns: int
    rest: int


def _searched(nnz_C: Tensor, rows: int, accelerator: Accelerator) -> list[Split]:
    """The split of a piece for each threshold of the published search."""
    total, threshold = int(nnz_C.sum()), accelerator.threshold
    tried = []
    for _ in range(accelerator.tries):
        dense_C = nnz_C > math.floor(threshold * rows)
        held = int(nnz_C[dense_C].sum())
        tried.append(Split(int(dense_C.sum()), total - held))
        if held >= accelerator.most_dense * total:
            threshold += accelerator.threshold_step
        elif held <= accelerator.least_dense * total:
            threshold -= accelerator.threshold_step
        else:
            break
    return tried


def _busy(split: Split, rows: int, height: int, accelerator: Accelerator) -> tuple[int, int]:
    """Cycles in which the denser and the sparser engine work on a piece. The piece takes the larger number.

    Lines are divided by work, rounded down for the denser engine. It gets at least one line: the published rule would
    divide by zero if it has columns but less than one line's share of the work.

    Args:
        split: of the columns.
        rows: R of the piece; the work of the denser engine is R · G.
        height: multiplications per column of the denser engine: R, or the number of columns C by the published formula.
        accelerator: its settings.
    """
    if not split.columns:
        return 0, _divided_up(split.rest, accelerator.array)
    work = rows * split.columns
    lines = max(1, accelerator.lines * work // (work + split.rest))
    denser = _divided_up(height * split.columns, accelerator.multipliers * lines)
    if not split.rest:
        return denser, 0
    return denser, _divided_up(split.rest, accelerator.multipliers * (accelerator.lines - lines))


def _divided_up(work: int, speed: int) -> int:
    """Work over speed, rounded up."""
    return -(-work // speed)
