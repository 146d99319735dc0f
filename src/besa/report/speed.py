"""Tables of how fast packed models run and of what they take."""

from __future__ import annotations

from besa.report import wording
from besa.report.figures import Table
from besa.report.results import Entry
from besa.runtime.timings import Bench
from besa.storage.names import printable


def tables(entries: list[Entry]) -> list[Table]:
    """Two for each run whose speed was measured."""
    benches = [(entry.label, entry.run.bench) for entry in entries if entry.run.bench]
    return [table for label, bench in benches for table in (_speeds(label, bench), _sizes(label, bench))]


def _speeds(label: str, bench: Bench) -> Table:
    processor, number = bench.machine.get("processor", "an unknown processor"), bench.machine.get("threads")
    threads = "? threads" if number is None else wording.counted(number, "thread")
    caption = (
        f"{label}: tokens a second, by median and quartiles of {wording.counted(bench.rounds, 'round')} on "
        f"{processor}, {threads}, which reads {bench.bandwidth / 1e9:.1f} GB/s; "
        f"{wording.TIMES} compares with {bench.models[0].name} in its fastest form"
    )
    head = ["work", "model", "form", "median", "quartiles", wording.TIMES, "limit", "of limit"]
    rows = []
    for work in bench.works():
        for model, timing, ratio in bench.of(work):
            middle, low, high, limit = timing.paces()
            share = wording.percent(timing.limit / timing.seconds, 0)
            numbers = [middle, f"{low} to {high}", f"{ratio:.2f}", limit, share]
            rows.append([*map(printable, (work, model.name, model.form)), *numbers])
    return Table(printable(caption), head, rows, words=3)


def _sizes(label: str, bench: Bench) -> Table:
    rows = [
        [
            *map(printable, (model.name, model.form, model.dtype)),
            wording.size(model.file_bytes),
            wording.NO_VALUE if model.resident_bytes is None else wording.size(model.resident_bytes),
            wording.size(model.step_bytes),
        ]
        for model in bench.models
    ]
    head = ["model", "form", "dtype", "weight files", "resident memory", "read by a decoding step"]
    return Table(f"{label}: what the models take", head, rows, words=3)
