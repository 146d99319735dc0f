"""The report page: runs in, one self-contained HTML document out."""

from __future__ import annotations

import shlex
from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from besa.errors import BesaError
from besa.models.structures import stay
from besa.record import RunRecord
from besa.report import (
    accuracy,
    allocation,
    differences,
    domains,
    figures,
    reproduce,
    results,
    simulation,
    speed,
    wording,
)
from besa.report.results import Entry, Pruned
from besa.report.runs import Run, labels
from besa.storage.names import is_path
from besa.version import __version__


def render(runs: list[Run]) -> str:
    """The report on `runs` as HTML that needs nothing else; the same runs give the same text.

    Raises:
        BesaError: there are no runs.
    """
    if not runs:
        raise BesaError("There is nothing to report: give at least one run folder.")
    entries = _entries(runs)
    pruned = [(entry, entry.run.record) for entry in entries if entry.run.record]
    return _template().render(
        title=_title(runs),
        headline=results.headline(entries),
        notes=results.notes(entries),
        facts=_facts(entries, [record for _, record in pruned]),
        version=__version__,
        script=Markup(_script()),
        script_digest=b64encode(sha256(_script().encode()).digest()).decode(),
        **_results(entries),
        **_blocks(pruned),
        differing=differences.table(pruned),
        cost=figures.cost(pruned) if pruned else None,
        speeds=speed.tables(entries),
        gpu=any(record.peak_gpu_memory_bytes is not None for _, record in pruned),
        simulated=simulation.plot(entries),
        pruned=pruned,
        **_reproduction(entries),
    )


@cache
def _script() -> str:
    return (resources.files("besa.report") / "script.js").read_text(encoding="utf-8")


@cache
def _template() -> Template:
    # The loader hands over the files of this package as they are installed; names in records are never trusted.
    environment = Environment(
        loader=PackageLoader("besa.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (wording.perplexity, wording.percent, wording.count, wording.seconds, wording.size, wording.significant)
    environment.filters |= {function.__name__: function for function in filters}
    return environment.get_template("template.html")


def _entries(runs: list[Run]) -> list[Entry]:
    """Runs with labels, colours and names of folders, dense models first."""
    named = sorted(zip(labels(runs), runs, strict=True), key=lambda item: not item[1].dense)
    dense = sum(run.dense for run in runs)
    folders = reproduce.folders([label for label, _ in named])
    return [
        Entry(label, run, None if run.dense else i - dense, folder)
        for i, ((label, run), folder) in enumerate(zip(named, folders, strict=True))
    ]


def _title(runs: list[Run]) -> str:
    models = [run.record.model.get("source") or run.record.model.get("architecture") for run in runs if run.record]
    models += [run.measured.model for run in runs if run.measured and not models]
    return ", ".join(dict.fromkeys(_short(str(model)) for model in models if model)) or "a model"


def _short(model: str) -> str:
    """The last part of a path; a Hugging Face id stays whole."""
    return Path(model).name or model if is_path(model) else model


def _facts(entries: list[Entry], records: list[RunRecord]) -> list[tuple[str, str]]:
    """What all runs share, or the values in which they differ."""

    def model(key: str) -> list[Any]:
        return [record.model.get(key) for record in records]

    parameters = [wording.count(number) for number in model("parameters") if number]
    facts: list[tuple[str, list[Any]]] = [
        ("Model", model("source") or [e.run.measured.model for e in entries if e.run.measured]),
        ("File", model("gguf")),
        ("Architecture", model("architecture")),
        ("Parameters", parameters),
        (
            "Prunable",
            [
                f"{wording.count(record.weights)} in {wording.counted(len(record.blocks), 'block')}"
                for record in records
            ],
        ),
        ("Number format", model("dtype")),
        ("Sparsity", [entry.sparsity for entry in entries if entry.run.record]),
        ("Pruned, of the whole model", [wording.percent(r.model_sparsity) for r in records if r.model_sparsity]),
        ("Structures", [", ".join(stay({block.index: block.structures for block in r.blocks})) for r in records]),
        ("Experts", [figures.experts_left(record) for record in records]),
        ("Dense in the blocks", [", ".join(sorted(record.dense)) for record in records]),
        ("Calibration", [_calibration(record) for record in records]),
        ("Perplexity windows", [f"{window:,} tokens" for window in results.windows(entries)]),
        ("Date", sorted(record.created[:10] for record in records)),
        ("besa", [record.versions.get("besa") for record in records]),
    ]
    distinct = [(name, list(dict.fromkeys(str(value) for value in values if value))) for name, values in facts]
    return [(name, "; ".join(values)) for name, values in distinct if values]


def _calibration(record: RunRecord) -> str:
    about = record.calibration
    parts = [str(about.get("source", "unknown text"))]
    if "samples" in about and "seqlen" in about:
        samples, seqlen = wording.count(about["samples"]), wording.count(about["seqlen"])
        parts.append(f"{samples} {wording.TIMES} {seqlen} tokens")
    if given := about.get("parts"):
        parts.append(" + ".join(f"{part['samples']} {part['source']}" for part in given))
    if about.get("chat"):
        parts.append("as dialogues")
    return ", ".join([*parts, f"seed {about.get('seed', record.seed)}"])


def _results(entries: list[Entry]) -> dict[str, Any]:
    texts = results.texts(entries)
    cells = [[results.cell(entries, entry, text) for text in texts] for entry in entries]
    return {
        "texts": texts,
        "windows": results.windows(entries),
        "rows": list(zip(entries, cells, strict=True)),
        "ratios": any(cell and cell.ratio is not None for row in cells for cell in row),
        "perplexities": figures.perplexities(entries),
        "domains": domains.means(entries),
        "accuracies": accuracy.accuracies(entries),
        "changes": accuracy.changes(entries),
        "lengths": accuracy.lengths(entries),
        "footnotes": _footnotes(entries, any(cell and cell.best for row in cells for cell in row)),
    }


def _footnotes(entries: list[Entry], compared: bool) -> list[str]:
    windows = results.windows(entries)
    notes = []
    if len(windows) == 1:
        notes.append(f"Perplexity in windows of {wording.count(windows[0])} tokens.")
    if not windows:
        notes.append("No perplexity was measured.")
    if compared:
        notes.append("Bold: the lowest at its sparsity.")
    if any(entry.run.record for entry in entries):
        notes.append("Sparsity is counted in the tensors that the run wrote.")
    notes += [f"{e.label}: {e.run.measured.model}, unpruned." for e in entries if e.run.dense and e.run.measured]
    return notes


def _blocks(pruned: Pruned) -> dict[str, Any]:
    pruned = [(entry, record) for entry, record in pruned if record.blocks]
    scale, maps = figures.sparsity_maps(pruned)
    mapped = {label for label, _ in maps}
    title, y_label = "Reconstruction error by block", "relative squared error"
    return {
        "scale": scale,
        "maps": maps,
        "even": [entry.label for entry, _ in pruned if entry.label not in mapped],
        "uniform": 100 * allocation.UNIFORM,
        "errors": figures.by_block(pruned, "reconstruction_error", title, y_label, 300) if pruned else None,
        "row_rates": figures.row_rates(pruned),
        "learned_rows": [(entry.label, entry.color) for entry, record in pruned if allocation.learned_rows(record)],
        "losses": figures.loss_curves(pruned),
        "distilling": figures.distilling(pruned),
        "experts": figures.experts(pruned),
        "block_seconds": figures.by_block(pruned, "seconds", "Seconds by block", "seconds", 200) if pruned else None,
    }


def _reproduction(entries: list[Entry]) -> dict[str, Any]:
    return {
        "steps": [_steps(entry) for entry in entries],
        "again": reproduce.report(entries),
        "files": reproduce.files(entries),
    }


def _steps(entry: Entry) -> dict[str, Any]:
    """Commands, recipe and origin of one run."""
    record = entry.run.record
    commands = [
        reproduce.prune(entry, record) if record else None,
        *(reproduce.form(entry, record) if record else ()),
        reproduce.evaluate(entry),
        reproduce.simulate(entry),
    ]
    return {
        "label": entry.label,
        "commands": [command for command in commands if command],
        "recorded": shlex.join(record.command) if record and record.command else None,
        "recipe": reproduce.recipe_yaml(record) if record else None,
        "save_as": f"{entry.folder}.yaml" if record and not reproduce.is_shipped(record) else None,
        "identity": _identity(record) if record else [],
    }


def _identity(record: RunRecord) -> list[tuple[str, str]]:
    facts = {
        "Model": record.model.get("source"),
        "Revision": record.model.get("revision"),
        "Model fingerprint": record.model.get("fingerprint"),
        "Calibration tokens, SHA-256": record.calibration.get("sha256"),
        "Seed": record.seed,
        "Versions": ", ".join(f"{name} {number}" for name, number in record.versions.items()),
        "Machine": ", ".join(f"{name} {value}" for name, value in record.machine.items() if value is not None),
        "Made": record.created,
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]
