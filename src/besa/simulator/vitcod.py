"""Cycles of the ViTCoD accelerator (You et al., HPCA 2023) for a pruned weight: section 4.5, appendix B of the paper.

Columns of the weight with many non-zeros go to the denser engine, which works through them whole, zeros included; the
non-zeros of all other columns go to the sparser engine. Both work at once, on lines of multipliers that are shared out
by work, and add to outputs that stay in the array. So only the number of non-zeros in each column counts.

Shape suffixes: C columns (input channels) of a weight or of a piece of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal

from pydantic import Field
from torch import Tensor

from besa.settings import Settings

KIB = 1024


class Accelerator(Settings):
    """What is simulated; the defaults are ViTCoD's.

    Attributes:
        lines: of multipliers, shared out between the engines.
        multipliers: in a line; each multiplies and accumulates once a cycle.
        threshold: a column with more than this share of its rows non-zero is dense, where the search starts.
        threshold_step: by which the search moves.
        least_dense: share of the non-zeros in dense columns at or below which the threshold falls.
        most_dense: the share at or above which it rises; between both the search ends.
        tries: thresholds that are tried at most.
        clock_hz: cycles a second.
        bandwidth: bytes a second of the memory interface.
        weight_bits: of a weight in memory.
        activation_bits: of an input or output in memory.
        accumulator_bits: of an output that is being summed up.
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

    @property
    def array(self) -> int:
        """Multiply-accumulates a cycle."""
        return self.lines * self.multipliers


@dataclass(frozen=True)
class Cycles:
    """Cycles of a weight for one input vector, everything being on the chip.

    Attributes:
        published: by the formula behind the paper's Table 4.
        corrected: with the rows of the weight where that has its columns.
        best: corrected, with the best threshold for each piece. It is the one that no column reaches: the sparser
            engine alone is then busy with nothing but non-zeros, and any column given to the denser one adds zeros.
        bound: non-zeros by multipliers; no array of this size can take less. Best is more only by the rounding up of
            each piece.
        denser: of the corrected ones, those in which the denser engine works.
        sparser: those in which the sparser one does.
        dense_columns: how many columns corrected gives the denser engine.
        rest: non-zeros that it leaves for the sparser one.
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

    A weight with more columns than rows is cut into pieces as wide as it is high, which follow one another.

    Args:
        nnz_C: non-zeros of each column (C), integers.
        rows: R of the weight.
        accelerator: what computes.
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
    """How the columns of a piece are shared out.

    Attributes:
        columns: G of the denser engine.
        rest: non-zeros in the other columns, for the sparser one.
    """

    columns: int
    rest: int


def _searched(nnz_C: Tensor, rows: int, accelerator: Accelerator) -> list[Split]:
    """What each threshold of the published search makes of a piece."""
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
    """Cycles in which the denser and the sparser engine work on a piece; it takes the larger of both.

    Lines are shared by work, rounded down for the denser engine. It gets at least one: the published rule would
    divide by zero where it has columns, but less than a line's share of the work.

    Args:
        split: of the columns.
        rows: R of the piece; the denser engine has R · G to do.
        height: what a column costs the denser engine: R, or by the published formula the number of columns C.
        accelerator: what computes.
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
    """Work by speed, rounded up."""
    return -(-work // speed)
