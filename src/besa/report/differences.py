"""What tells the runs of a page apart: every setting, and what they were made with, that is not the same in all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from besa.record import RunRecord
from besa.report import wording
from besa.report.figures import Table
from besa.report.results import Pruned
from besa.storage.names import printable

DIGEST = 12  # characters of a digest that are shown


def table(pruned: Pruned) -> Table | None:
    """A row for each setting that differs, a column for each run; None where nothing does, or one run is alone."""
    columns = [dict(_settings(record)) for _, record in pruned]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [[name, *(column.get(name, wording.NO_VALUE) for column in columns)] for name in names]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    stages = list(dict.fromkeys(map(_stage, names)))  # what one run does not have stands beside its like
    rows.sort(key=lambda row: stages.index(_stage(row[0])))
    head = ["setting", *(entry.label for entry, _ in pruned)]
    caption = "Recipe, seed, calibration, model, versions and machine, where they are not the same in all runs"
    return Table(caption, head, rows, len(head)) if rows else None


def _stage(name: str) -> str:
    return name.partition(".")[0]


def _settings(record: RunRecord) -> Iterator[tuple[str, str]]:
    """Names with dots between keys, and values, in the order of the record."""
    calibration = {key: value for key, value in record.calibration.items() if key != "sha256"}
    if tokens := record.calibration.get("sha256"):
        calibration["tokens"] = f"SHA-256 {tokens[:DIGEST]}…"
    model = {key: record.model.get(key) for key in ("source", "gguf", "revision", "dtype")}
    parts = {
        "": {key: value for key, value in record.recipe.items() if key != "name"},
        "seed": record.seed,
        "batch": record.batch,
        "calibration": calibration,
        "model": model,
        "ranks": record.ranks,
        "versions": record.versions,
        "machine": record.machine,
    }
    for name, value in parts.items():
        yield from _flat(name, value)


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else str(key), inner)
    else:
        yield printable(name), wording.NO_VALUE if value is None else printable(_said(value))


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_said, value)) or wording.NO_VALUE
    return str(value)
