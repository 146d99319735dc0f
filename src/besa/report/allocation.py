"""Where the zeros went: sparsity by block and linear, and pruning rates by row."""

from __future__ import annotations

import math
from dataclasses import dataclass

from besa.models.kinds import kind, shortened
from besa.record import HISTOGRAM_BINS, BlockRecord, RunRecord

UNIFORM = 0.001  # deviation of a linear from its run's sparsity that is still rounding


@dataclass(frozen=True)
class Part:
    """The linears of one short name in one block: one, or all experts together."""

    weights: int
    zeros: int
    row_rates: list[int]

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.weights if self.weights else 0.0


def parts(record: RunRecord) -> dict[str, dict[int, Part]]:
    """Parts by short name of the linear and index of the block, names in the order of the model."""
    paths = list(dict.fromkeys(path for block in record.blocks for path in _paths(block)))
    table: dict[str, dict[int, Part]] = {}
    for path, name in zip(paths, shortened(paths), strict=True):
        table[name] = {block.index: _part(block, path) for block in record.blocks if path in _paths(block)}
    return table


def _paths(block: BlockRecord) -> list[str]:
    """Kind of each linear."""
    return [kind(linear.name, block.name) for linear in block.linears]


def _part(block: BlockRecord, path: str) -> Part:
    linears = [linear for linear, own in zip(block.linears, _paths(block), strict=True) if own == path]
    rows = (linear.row_rates for linear in linears)
    return Part(
        weights=sum(math.prod(linear.shape) for linear in linears),
        zeros=sum(linear.zeros for linear in linears),
        row_rates=[sum(bins) for bins in zip(*rows, strict=False)] or [0] * HISTOGRAM_BINS,
    )


def together(over: dict[int, Part]) -> Part:
    """One part of all blocks."""
    return Part(
        weights=sum(part.weights for part in over.values()),
        zeros=sum(part.zeros for part in over.values()),
        row_rates=[sum(bins) for bins in zip(*(part.row_rates for part in over.values()), strict=False)],
    )


def deviation(record: RunRecord) -> float:
    """How far the sparsity of a linear is from that of the run, at most."""
    shares = (part.sparsity for over in parts(record).values() for part in over.values())
    return max((abs(share - record.sparsity) for share in shares), default=0.0)


def learned_rows(record: RunRecord) -> bool:
    """Whether the run learned a pruning rate for each row."""
    return bool(record.recipe.get("allocation", {}).get("rates") == "row")
