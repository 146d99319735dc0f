"""Simulation of a checkpoint: cycles of each linear, and their means over the blocks.

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
from besa.models.source import Source, fingerprint
from besa.progress import Progress, silent
from besa.record import now
from besa.settings import LARGEST
from besa.simulator.bandwidth import load_cycles
from besa.simulator.vitcod import Accelerator, Cycles, cycles
from besa.storage.names import pinned
from besa.system.machine import versions

Number = TypeVar("Number", int, float)
RULES = {  # figures of `Cycles`, without memory traffic
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
        cycles_bound: non-zeros divided by the number of multipliers.
        cycles_memory: by number of input vectors T, the larger of loading (`bandwidth`) and T times corrected.
    """

    cycles_published: Number
    cycles_corrected: Number
    cycles_best: Number
    cycles_bound: Number
    cycles_memory: dict[int, Number]

    def each(self) -> dict[str, Number]:
        """All figures by name: `published`, …, `memory_1`, …."""
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
        dense: the same figures without zeros. If the weight has more rows than columns, `published` is that of its
            transpose: Table 4 prints 10128 for gate and up (11008 × 4096) as for down (4096 × 11008).
        utilization: of both engines.
        speedup: cycles of the dense weight over those of this weight, for each figure; None if all weights are zero.
    """

    sparsity: float
    dense: Figures[Number]
    utilization: Utilization

    @computed_field  # type: ignore[prop-decorator]
    @property
    def speedup(self) -> dict[str, float | None]:
        """Cycles of the dense weight over those of this weight, for each figure."""
        return {
            name: dense / sparse if sparse else None
            for (name, dense), sparse in zip(self.dense.each().items(), self.each().values(), strict=True)
        }


class LinearSimulation(Simulated[int]):
    """One linear, by its module path."""

    name: str
    block: str
    shape: tuple[int, int]
    nnz: int


class MeanSimulation(Simulated[float]):
    """A mean over the blocks: of one kind of linear (including all experts), or of all linears of a block together."""

    name: str
    linears: int


class Simulation(BaseModel):
    """The result of `simulate`; the JSON that `besa simulate` writes.

    Attributes:
        model: name of the model.
        revision: its commit, if it came from the Hugging Face Hub.
        fingerprint: digest of its files; None in files of before.
        accelerator: its settings.
        linears: each linear alone.
        kinds: means over linears with the same path inside their blocks.
        block: mean over the blocks of the sum of their linears.
        created: time in ISO 8601.
        versions: of besa and of the packages that affect the numbers.
        baselines: the same of other checkpoints of the model, with which it is compared.
    """

    model: str
    revision: str | None = None
    fingerprint: str | None = None
    accelerator: Accelerator
    linears: list[LinearSimulation]
    kinds: list[MeanSimulation]
    block: MeanSimulation
    created: str
    versions: dict[str, str]
    baselines: list[Simulation] = []


def simulate(
    source: Source, tokens: Sequence[int], accelerator: Accelerator, progress: Progress = silent
) -> Simulation:
    """Simulate every prunable weight of a checkpoint; a Hugging Face id is downloaded first.

    Args:
        source: dense, pruned or packed.
        tokens: numbers of input vectors for the figures with memory.
        accelerator: its settings.
        progress: told about a download, then called with (blocks done, number of blocks, name of the block).

    Raises:
        BesaError: a number of tokens is not positive or too large, the model cannot be fetched, or as `stored_weights`
            does.
    """
    if not tokens or min(tokens) < 1 or max(tokens) > LARGEST:
        numbers = ", ".join(map(str, tokens)) or "none at all"
        raise BesaError(f"Numbers of tokens must be positive and at most {LARGEST:,}, not {numbers}.")
    source = source.local(progress)
    linears = [simulate_weight(weight, tuple(tokens), accelerator) for weight in stored_weights(source, progress)]
    by_kind: dict[str, list[LinearSimulation]] = {}
    for linear in linears:
        by_kind.setdefault(kind(linear.name, linear.block), []).append(linear)
    return Simulation(
        model=source.base,
        revision=source.revision,
        fingerprint=fingerprint(source),
        accelerator=accelerator,
        linears=linears,
        kinds=[_mean(name, of_kind, len(of_kind)) for name, of_kind in by_kind.items()],
        block=_mean("all", linears, len({linear.block for linear in linears})),
        created=now(),
        versions=versions(),
    )


def check_alike(simulations: Sequence[Simulation]) -> None:
    """Check that checkpoints fit into one table.

    Raises:
        BesaError: the linears of one have other names or shapes than those of the first.
    """
    first, *others = simulations
    for other in others:
        shapes = [{linear.name: linear.shape for linear in one.linears} for one in (other, first)]
        if shapes[0] != shapes[1]:
            names = [pinned(one.model, one.revision) for one in (other, first)]
            raise BesaError(f"{names[0]} has other linears than {names[1]}: compare checkpoints of one model.")


def simulate_weight(weight: StoredWeight, tokens: tuple[int, ...], accelerator: Accelerator) -> LinearSimulation:
    """Simulate one weight; the other arguments are those of `simulate`."""
    rows, columns = weight.zero_OI.shape
    zeros_C = torch.from_numpy(np.count_nonzero(weight.zero_OI.numpy(), axis=0))  # ten times as fast as torch's
    counted = cycles(rows - zeros_C, rows, accelerator)
    nnz = rows * columns - int(zeros_C.sum())
    return LinearSimulation(
        name=weight.name,
        block=weight.block,
        shape=(rows, columns),
        nnz=nnz,
        sparsity=1 - nnz / (rows * columns),
        dense=_dense(rows, columns, tokens, accelerator),
        utilization=Utilization(
            denser=counted.denser / max(1, counted.corrected), sparser=counted.sparser / max(1, counted.corrected)
        ),
        **_figures(counted, rows, columns, tokens, accelerator),
    )


def _figures(
    counted: Cycles, rows: int, columns: int, tokens: Sequence[int], accelerator: Accelerator
) -> dict[str, Any]:
    """Fields of a `Figures`."""

    def with_memory(count: int) -> int:
        load = load_cycles(rows, columns, counted.dense_columns, counted.rest, count, accelerator)
        return max(load, count * counted.corrected)

    by_rule = {f"cycles_{rule}": getattr(counted, rule) for rule in RULES}
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
    """The sum over some linears, divided by a number."""
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
    """Fields of a `Figures`: the sums, divided by a number."""
    by_rule = {f"cycles_{rule}": sum(one.each()[rule] for one in figures) / number for rule in RULES}
    counts = figures[0].cycles_memory
    memory = {count: sum(one.cycles_memory[count] for one in figures) / number for count in counts}
    return by_rule | {"cycles_memory": memory}
