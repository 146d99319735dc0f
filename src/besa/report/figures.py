"""What is drawn of the runs, with the numbers behind each drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from besa.record import HISTOGRAM_BINS, RunRecord
from besa.report import allocation, plots, wording
from besa.report.plots import Series
from besa.report.results import Entry, Pruned, reference, texts, windows
from besa.storage.names import printable

POINTS = 64  # of a loss curve
LOG = 10  # spread beyond which bars get a logarithmic scale
LIMITS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)  # of the colour scale


@dataclass(frozen=True)
class Table:
    """The numbers behind a plot, as text.

    Attributes:
        caption: what they are.
        head: names of the columns.
        rows: each begins with its name.
        words: how many of the first columns hold words, not numbers.
        foot: rows over all others, which stay last when those are sorted.
    """

    caption: str
    head: list[str]
    rows: list[list[str]]
    words: int = 1
    foot: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Plot:
    """Drawings that belong together, and their numbers.

    Attributes:
        drawings: side by side where there is room.
        tables: the numbers.
        caption: what must be known to read the drawings.
        narrow: other drawings of the same for narrow windows, if these are too wide.
    """

    drawings: list[Markup]
    tables: list[Table] = field(default_factory=list)
    caption: str = ""
    narrow: list[Markup] = field(default_factory=list)


def perplexities(entries: list[Entry]) -> Plot:
    """Bars of every pruned model by text; none of perplexities that do not compare."""
    drawings, captions = [], []
    for text in texts(entries) if len(windows(entries)) == 1 else []:
        shown = [(e, e.run.perplexity(text)) for e in entries if not e.run.dense]
        known = [(entry, value) for entry, value in shown if value is not None]
        if known and all(known[0][0].run.compares(entry.run, text) for entry, _ in known):
            items = [Series(entry.label, entry.color, [value]) for entry, value in known]
            dense = reference(entries, text, known[0][0].run)
            line = None if dense is None or not math.isfinite(dense) else (f"dense {wording.perplexity(dense)}", dense)
            values = [wording.perplexity(value) for _, value in known]
            log = plots.spread([value for _, value in known] + ([dense] if line and dense else [])) > LOG
            drawings.append(plots.bars(f"Perplexity on {text}", items, values, line, log))
            captions += ["Dashed: the dense model."] if line else []
            captions += ["Logarithmic scale" + (", bars start at dense." if line else ".")] if log else []
    return Plot(drawings, caption=" ".join(dict.fromkeys(captions)))


def sparsity_maps(pruned: Pruned) -> tuple[Markup | None, list[tuple[str, Plot]]]:
    """A colour scale, and by label a heat map of every run that did not prune all linears alike."""
    uneven = [(entry, record, allocation.deviation(record)) for entry, record in pruned]
    uneven = [item for item in uneven if item[2] > allocation.UNIFORM]
    if not uneven:
        return None, []
    largest = max(deviation for _, _, deviation in uneven)
    limit = next(limit for limit in LIMITS if largest <= limit)
    return plots.color_scale(limit), [(entry.label, _sparsity_map(entry, record, limit)) for entry, record, _ in uneven]


def _sparsity_map(entry: Entry, record: RunRecord, limit: float) -> Plot:
    title = f"Sparsity by block and linear, {entry.label}"
    table = allocation.parts(record)
    overall = {name: allocation.together(over).sparsity for name, over in table.items()}
    cells = {
        (name, index): (part.sparsity - record.sparsity, f"block {index}, {name}: {wording.percent(part.sparsity)}")
        for name, over in table.items()
        for index, part in over.items()
    }
    rows = []
    for block in record.blocks:
        own = (over.get(block.index) for over in table.values())
        shares = [wording.percent(part.sparsity) if part else wording.NO_VALUE for part in own]
        rows.append([str(block.index), *shares, wording.percent(block.sparsity)])
    over_all = ["all", *map(wording.percent, overall.values()), entry.sparsity]
    ends = {name: wording.percent(share, 1) for name, share in overall.items()}
    drawing = plots.heat_map(title, ends, [block.index for block in record.blocks], cells, limit)
    return Plot([drawing], [Table(title, ["block", *table, "all"], rows, foot=[over_all])])


def by_block(pruned: Pruned, quantity: str, title: str, y_label: str, height: int) -> Plot:
    """A line for every run: a field of the block records over the block's index."""
    indices = sorted({block.index for _, record in pruned for block in record.blocks})
    columns = [{block.index: float(getattr(block, quantity)) for block in record.blocks} for _, record in pruned]
    series = [
        Series(entry.label, entry.color, [column.get(index, math.nan) for index in indices])
        for (entry, _), column in zip(pruned, columns, strict=True)
    ]
    wide, narrow = (
        [plots.lines(title, indices, series, "block", y_label, size)]
        for size in ((plots.WIDE, height), (plots.HALF, min(height, 230)))
    )
    rows = [[str(index), *(wording.significant(column.get(index)) for column in columns)] for index in indices]
    return Plot(wide, [Table(title, ["block", *(entry.label for entry, _ in pruned)], rows)], narrow=narrow)


def row_rates(pruned: Pruned) -> Plot:
    """Histograms of learned row rates, one for each name of a linear, over all blocks."""
    tables = [(entry, allocation.parts(record)) for entry, record in pruned if allocation.learned_rows(record)]
    counts = {
        entry: {name: allocation.together(over).row_rates for name, over in table.items()} for entry, table in tables
    }
    names = list(dict.fromkeys(name for bins in counts.values() for name in bins))
    used = [i for own in counts.values() for bins in own.values() for i, number in enumerate(bins) if number]
    if not used:
        return Plot([])
    limits = max(0, min(used) - 1) / HISTOGRAM_BINS, min(HISTOGRAM_BINS, max(used) + 2) / HISTOGRAM_BINS
    targets = sorted({entry.run.target or 0.0 for entry in counts})
    shares = {
        name: [Series(e.label, e.color, _shares(own[name])) for e, own in counts.items() if name in own]
        for name in names
    }
    top = 1.05 * max(max(line.values) for series in shares.values() for line in series)
    drawings = [
        plots.histogram(f"{name}: share of rows by learned pruning rate", series, limits, top, targets)
        for name, series in shares.items()
    ]
    return Plot(drawings, [_rates_table(entry.label, own) for entry, own in counts.items()])


def _shares(bins: list[int]) -> list[float]:
    return [number / max(1, sum(bins)) for number in bins]


def _rates_table(label: str, counts: dict[str, list[int]]) -> Table:
    rows = []
    for i, numbers in enumerate(zip(*counts.values(), strict=True)):
        if any(numbers):
            edges = [wording.percent(edge / HISTOGRAM_BINS, 0) for edge in (i, i + 1)]
            rows.append([" to ".join(edges), *map(wording.count, numbers)])
    return Table(f"Rows by learned pruning rate, {label}", ["rate", *counts], rows)


def loss_curves(pruned: Pruned) -> list[tuple[str, Plot]]:
    """For every run that learned: label, and the mean over blocks beside three single blocks."""
    found = []
    for entry, record in pruned:
        losses = {block.index: block.losses for block in record.blocks if block.losses}
        if losses:
            found.append((entry.label, _loss_curve(entry, losses)))
    return found


def _loss_curve(entry: Entry, losses: dict[int, list[float]]) -> Plot:
    steps = max(map(len, losses.values()))
    stride = math.ceil(steps / POINTS)
    starts = range(0, steps, stride)
    curves = {index: [_mean(own[start : start + stride]) for start in starts] for index, own in losses.items()}
    learning = [sum(not math.isnan(value) for value in at) for at in zip(*curves.values(), strict=True)]
    average = [_mean(at) for at in zip(*map(_held, curves.values()), strict=True)]
    indices = sorted(curves)
    chosen = sorted({indices[0], indices[len(indices) // 2], indices[-1]}) if len(indices) > 1 else []
    series = [Series(f"block {index}", None, curves[index], faint=True) for index in chosen]
    series.append(Series("mean of blocks", entry.color, average))
    x = [min(steps, start + stride) for start in starts]
    captions = [f"Each point is the mean of {stride} steps."] if stride > 1 else []
    if min(learning) < len(curves):
        captions.append("A block that stopped early counts in the mean with its last loss.")
    caption = " ".join(captions)
    title = f"Reconstruction loss against learning step, {entry.label}"
    notes = [f"{count} of {wording.counted(len(curves), 'block')} learning" for count in learning]
    drawing = plots.lines(title, x, series, "learning step", "loss", (plots.HALF, 230), notes)
    places = sorted({0, len(x) // 2, len(x) - 1})
    rows = [[str(index), *(wording.significant(curve[place]) for place in places)] for index, curve in curves.items()]
    mean = ["mean", *(wording.significant(average[place]) for place in places)]
    return Plot(
        [drawing], [Table(title, ["block", *(f"step {x[place]}" for place in places)], rows, foot=[mean])], caption
    )


def _held(curve: list[float]) -> list[float]:
    """A curve whose last loss goes on, so that a mean over blocks is of the same blocks at every step."""
    held: list[float] = []
    for value in curve:
        held.append(held[-1] if held and math.isnan(value) else value)
    return held


def distilling(pruned: Pruned) -> Plot | None:
    """The held-out loss of every distilled run before the first epoch and after every epoch; None without one."""
    found = [(entry, record.distilling) for entry, record in pruned]
    losses = [(entry, distilled.losses) for entry, distilled in found if distilled is not None and distilled.losses]
    if not losses:
        return None
    title, epochs = "Loss of distilling by epoch", range(max(len(own) for _, own in losses))
    columns = [[*own, *[math.nan] * (len(epochs) - len(own))] for _, own in losses]
    series = [Series(entry.label, entry.color, column) for (entry, _), column in zip(losses, columns, strict=True)]
    drawing = plots.lines(title, epochs, series, "epoch", "nats", (plots.HALF, 230))
    rows = [[str(epoch), *(wording.significant(column[epoch]) for column in columns)] for epoch in epochs]
    return Plot([drawing], [Table(title, ["epoch", *(entry.label for entry, _ in losses)], rows)])


def experts_left(record: RunRecord) -> str:
    """How many experts are left of a model that lost some; empty for others."""
    if record.experts is None:
        return ""
    before, after = record.experts
    mixtures = wording.counted(len(record.mixtures), "mixture")
    return f"{wording.count(after)} of {wording.count(before)} in each of {mixtures}"


def experts(pruned: Pruned) -> list[Table]:
    """For every run that dropped experts: which went, and what share of the calibration tokens they had."""
    tables = []
    for entry, record in pruned:
        rows = []
        for mixture in record.mixtures:
            had = sum(number for expert, number in enumerate(mixture.tokens) if expert in mixture.gone)
            rows.append(
                [
                    printable(mixture.name),
                    ", ".join(map(str, mixture.gone)),
                    wording.percent(had / max(1, sum(mixture.tokens))),
                ]
            )
        if rows:
            tables.append(Table(f"Experts that went, {entry.label}", ["mixture", "experts", "of its tokens"], rows))
    return tables


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def cost(pruned: Pruned) -> Plot:
    """Bars of time and of peak memory, of the GPU too where one was used."""
    times = [(entry, record.seconds, wording.seconds(record.seconds)) for entry, record in pruned]
    memory = [(entry, record.peak_memory_bytes) for entry, record in pruned]
    gpu = [(e, record.peak_gpu_memory_bytes) for e, record in pruned if record.peak_gpu_memory_bytes is not None]
    drawings = [_cost_bars("Pruning time, seconds", times)]
    for title, peaks in (("Peak memory, GB", memory), ("Peak GPU memory, GB", gpu)):
        if peaks:
            drawings.append(_cost_bars(title, [(entry, peak / 1e9, wording.size(peak)) for entry, peak in peaks]))
    return Plot(drawings)


def _cost_bars(title: str, items: list[tuple[Entry, float, str]]) -> Markup:
    series = [Series(entry.label, entry.color, [value]) for entry, value, _ in items]
    return plots.bars(title, series, [text for _, _, text in items])
