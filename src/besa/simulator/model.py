"""A simulated checkpoint: cycles of each linear, and their means over the blocks.

Shape suffixes: C columns (input channels), O rows (output channels), I columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, computed_field

from besa.checkpoint.walk import StoredWeight, stored_weights
from besa.errors import BesaError
from besa.models.kinds import kind
from besa.models.loading import Source
from besa.progress import Progress, silent
from besa.record import now
from besa.settings import LARGEST
from besa.simulator.bandwidth import load_cycles
from besa.simulator.vitcod import Accelerator, Cycles, cycles
from besa.system.machine import versions

Number = TypeVar("Number", int, float)
RULES = {  # figures of `Cycles` that know no memory
    "published": "published formula",
    "corrected": "corrected formula",
    "best": "best threshold",
    "bound": "work bound",
}


class Figures(BaseModel, Generic[Number]):
    """The cycles of `vitcod.Cycles` for one input vector, and with memory.

    Attributes:
        cycles_published: by the formula behind the paper's Table 4.
        cycles_corrected: by the corrected formula.
        cycles_best: corrected, with the best threshold.
        cycles_bound: non-zeros by multipliers.
        cycles_memory: by number of input vectors T, the larger of loading (`memory`) and T times corrected.
    """

    cycles_published: Number
    cycles_corrected: Number
    cycles_best: Number
    cycles_bound: Number
    cycles_memory: dict[int, Number]

    def each(self) -> dict[str, Number]:
        """All of them by name: `published`, …, `memory_1`, …."""
        by_rule = {rule: getattr(self, f"cycles_{rule}") for rule in RULES}
        return by_rule | {f"memory_{count}": number for count, number in self.cycles_memory.items()}


def described(figure: str) -> str:
    """A key of `Figures.each` in words."""
    count = figure.removeprefix("memory_")
    return RULES.get(figure) or f"with memory, {count} token" + ("" if count == "1" else "s")


class Utilization(BaseModel):
    """Share of the corrected cycles in which an engine works."""

    denser: float
    sparser: float


class Simulated(Figures[Number], Generic[Number]):
    """A pruned weight, or a mean of several.

    Attributes:
        sparsity: share of zeros.
        dense: the same figures with no zeros. Published is of the weight laid wide, with rows and columns exchanged
            where it is high: so Table 4 prints 10128 for gate and up (11008 × 4096) as for down (4096 × 11008).
        utilization: of both engines.
        speedup: cycles of the dense weight by its own, for each figure; None where all weights are zero.
    """

    sparsity: float
    dense: Figures[Number]
    utilization: Utilization

    @computed_field  # type: ignore[prop-decorator]
    @property
    def speedup(self) -> dict[str, float | None]:
        """Cycles of the dense weight by its own."""
        return {
            name: dense / own if own else None
            for (name, dense), own in zip(self.dense.each().items(), self.each().values(), strict=True)
        }


class LinearSimulation(Simulated[int]):
    """One linear, by its module path."""

    name: str
    block: str
    shape: tuple[int, int]
    nnz: int


class MeanSimulation(Simulated[float]):
    """A mean over the blocks: of one kind of linear (over all experts, too), or of all linears of a block together."""

    name: str
    linears: int


class Simulation(BaseModel):
    """What `simulate` found; the JSON that `besa simulate` writes.

    Attributes:
        model: what was simulated.
        accelerator: on which.
        linears: each by itself.
        kinds: means over linears of the same path inside their blocks.
        block: mean over the blocks of the sum of their linears.
        created: when.
        versions: of besa and of what the numbers depend on.
    """

    model: str
    accelerator: Accelerator
    linears: list[LinearSimulation]
    kinds: list[MeanSimulation]
    block: MeanSimulation
    created: str
    versions: dict[str, str]


def simulate(
    source: Source, tokens: Sequence[int], accelerator: Accelerator, progress: Progress = silent
) -> Simulation:
    """Simulate every prunable weight of a local checkpoint.

    Args:
        source: dense, pruned or packed.
        tokens: numbers of input vectors for the figures with memory.
        accelerator: what computes.
        progress: told (blocks done, blocks, name of the block).

    Raises:
        BesaError: a number of tokens is not positive or too large, or as `stored_weights` does.
    """
    if not tokens or min(tokens) < 1 or max(tokens) > LARGEST:
        given = ", ".join(map(str, tokens)) or "none at all"
        raise BesaError(f"Numbers of tokens must be positive and at most {LARGEST:,}, not {given}.")
    linears = [simulate_weight(weight, tuple(tokens), accelerator) for weight in stored_weights(source, progress)]
    by_kind: dict[str, list[LinearSimulation]] = {}
    for linear in linears:
        by_kind.setdefault(kind(linear.name, linear.block), []).append(linear)
    return Simulation(
        model=source.name,
        accelerator=accelerator,
        linears=linears,
        kinds=[_mean(name, own, len(own)) for name, own in by_kind.items()],
        block=_mean("all", linears, len({linear.block for linear in linears})),
        created=now(),
        versions=versions(),
    )


def check_alike(simulations: Sequence[Simulation]) -> None:
    """See that checkpoints can stand in one table.

    Raises:
        BesaError: one has linears of other names or shapes than the first.
    """
    first, *others = simulations
    for other in others:
        if {own.name: own.dense for own in other.kinds} != {own.name: own.dense for own in first.kinds}:
            raise BesaError(f"{other.model} has other linears than {first.model}: compare checkpoints of one model.")


def simulate_weight(weight: StoredWeight, tokens: tuple[int, ...], accelerator: Accelerator) -> LinearSimulation:
    """Simulate one weight; arguments as of `simulate`."""
    rows, columns = weight.zero_OI.shape
    zeros_C = torch.from_numpy(np.count_nonzero(weight.zero_OI.numpy(), axis=0))  # ten times as fast as torch's
    found = cycles(rows - zeros_C, rows, accelerator)
    nnz = rows * columns - int(zeros_C.sum())
    return LinearSimulation(
        name=weight.name,
        block=weight.block,
        shape=(rows, columns),
        nnz=nnz,
        sparsity=1 - nnz / (rows * columns),
        dense=_dense(rows, columns, tokens, accelerator),
        utilization=Utilization(
            denser=found.denser / max(1, found.corrected), sparser=found.sparser / max(1, found.corrected)
        ),
        **_figures(found, rows, columns, tokens, accelerator),
    )


def _figures(found: Cycles, rows: int, columns: int, tokens: Sequence[int], accelerator: Accelerator) -> dict[str, Any]:
    def with_memory(count: int) -> int:
        load = load_cycles(rows, columns, found.dense_columns, found.rest, count, accelerator)
        return max(load, count * found.corrected)

    by_rule = {f"cycles_{rule}": getattr(found, rule) for rule in RULES}
    return by_rule | {"cycles_memory": {count: with_memory(count) for count in tokens}}


@cache
def _dense(rows: int, columns: int, tokens: tuple[int, ...], accelerator: Accelerator) -> Figures[int]:
    """The figures of a weight without zeros."""

    def full(height: int, width: int) -> Cycles:
        return cycles(torch.full((width,), height), height, accelerator)

    figures = _figures(full(rows, columns), rows, columns, tokens, accelerator)
    wide = full(min(rows, columns), max(rows, columns))
    return Figures[int](**figures | {"cycles_published": wide.published})


def _mean(name: str, linears: list[LinearSimulation], number: int) -> MeanSimulation:
    """The sum of some linears by a number."""
    weights = sum(linear.shape[0] * linear.shape[1] for linear in linears)
    corrected = sum(linear.cycles_corrected for linear in linears)
    busy = {
        engine: sum(getattr(linear.utilization, engine) * linear.cycles_corrected for linear in linears)
        for engine in ("denser", "sparser")
    }
    return MeanSimulation(
        name=name,
        linears=len(linears),
        sparsity=1 - sum(linear.nnz for linear in linears) / weights,
        dense=Figures[float](**_summed([linear.dense for linear in linears], number)),
        utilization=Utilization(**{engine: cycles / max(1, corrected) for engine, cycles in busy.items()}),
        **_summed(linears, number),
    )


def _summed(figures: Sequence[Figures[int]], number: int) -> dict[str, Any]:
    """Fields of a `Figures`: the sums by a number."""
    by_rule = {f"cycles_{rule}": sum(own.each()[rule] for own in figures) / number for rule in RULES}
    counts = figures[0].cycles_memory
    memory = {count: sum(own.cycles_memory[count] for own in figures) / number for count in counts}
    return by_rule | {"cycles_memory": memory}
