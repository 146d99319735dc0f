"""What a simulated accelerator makes of the runs: cycles and busy engines by block, and speed-ups over dense."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from besa.models.kinds import shortened
from besa.report import plots, wording
from besa.report.figures import Plot, Table
from besa.report.plots import Series
from besa.report.results import Entry
from besa.simulator.model import LinearSimulation, Simulation, described

CAPTION = (
    "Thin: the same weights without zeros. Busy is the share of the cycles in which an engine works; the denser one "
    "works on zeros too. Array on non-zeros: the fewest cycles that the non-zeros need, by the cycles it takes."
)
Blocks = list[list[LinearSimulation]]


def plot(entries: list[Entry]) -> Plot | None:
    """Cycles and what they are spent on, by block; the first table is of speed-ups."""
    runs = [(entry, entry.run.simulated) for entry in entries if entry.run.simulated and entry.run.simulated.linears]
    blocks = {entry.label: _blocks(simulation) for entry, simulation in runs}
    if not runs:
        return None
    depth = max(map(len, blocks.values()))

    def by_block(value: Callable[[list[LinearSimulation]], float]) -> list[Series]:
        return [
            Series(entry.label, entry.color, _filled([value(linears) for linears in blocks[entry.label]], depth))
            for entry, _ in runs
        ]

    dense = [float(sum(linear.dense.cycles_corrected for linear in own)) for own in max(blocks.values(), key=len)]
    series = {
        "cycles": [*by_block(_cycles), Series("no zeros", None, dense, faint=True)],
        "array on non-zeros": by_block(_useful),
        "denser engine busy": by_block(lambda own: _busy(own, "denser")),
        "sparser engine busy": by_block(lambda own: _busy(own, "sparser")),
    }
    drawings = [
        plots.lines(f"{label.capitalize()} by block", range(depth), own, "block", label, (plots.HALF, 230))
        for label, own in series.items()
    ]
    return Plot(drawings, [_speedups(runs), *(_kinds(*run) for run in runs), *_numbers(series, depth)], CAPTION)


def _blocks(simulation: Simulation) -> Blocks:
    """The linears of each block."""
    blocks: dict[str, list[LinearSimulation]] = {}
    for linear in simulation.linears:
        blocks.setdefault(linear.block, []).append(linear)
    return list(blocks.values())


def _cycles(linears: list[LinearSimulation]) -> float:
    return sum(linear.cycles_corrected for linear in linears)


def _busy(linears: list[LinearSimulation], engine: str) -> float:
    busy = sum(getattr(linear.utilization, engine) * linear.cycles_corrected for linear in linears)
    return busy / _cycles(linears) if _cycles(linears) else math.nan


def _useful(linears: list[LinearSimulation]) -> float:
    bound = sum(linear.cycles_bound for linear in linears)
    return bound / _cycles(linears) if _cycles(linears) else math.nan


def _filled(values: Sequence[float], length: int) -> list[float]:
    return [*values, *[math.nan] * (length - len(values))]


def _speedups(runs: list[tuple[Entry, Simulation]]) -> Table:
    """A row for each figure that any run has."""
    speedups = [simulation.block.speedup for _, simulation in runs]
    figures = dict.fromkeys(figure for own in speedups for figure in own)
    rows = [[described(figure), *(_times(own.get(figure)) for own in speedups)] for figure in figures]
    return Table("Speed-up over the same weights without zeros", ["", *(entry.label for entry, _ in runs)], rows)


def _times(ratio: float | None) -> str:
    return wording.times(ratio).rstrip() if ratio else wording.NO_VALUE


def _kinds(entry: Entry, simulation: Simulation) -> Table:
    """Mean cycles of each kind of linear, as in the paper's Table 4."""
    columns = [*simulation.kinds, simulation.block]
    rows = [
        [described(figure), *(f"{column.each()[figure]:,.1f}" for column in columns)]
        for figure in simulation.block.each()
    ]
    head = ["", *shortened([own.name for own in columns])]
    sparsity = ["sparsity", *(wording.percent(column.sparsity) for column in columns)]
    return Table(f"Cycles, mean over blocks, {entry.label}", head, rows, foot=[sparsity])


def _numbers(series: dict[str, list[Series]], depth: int) -> list[Table]:
    return [
        Table(
            f"{label.capitalize()} by block",
            ["block", *(line.label for line in own)],
            [[str(index), *(wording.significant(line.values[index], 6) for line in own)] for index in range(depth)],
        )
        for label, own in series.items()
    ]
