"""The files that an experiment writes: JSON with everything, Markdown with table and verdict, and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from besa.data.documents import read_documents
from besa.data.mixture import texts_of, without_folders
from besa.record import now
from besa.report.curves import curves
from besa.report.svg import standalone
from besa.storage.writing import write_file
from besa.studies.origin import Origin
from besa.studies.rows import markdown
from besa.system.devices import resolve_device
from besa.system.machine import machine, versions
from experiments.experiment import Experiment, Found, Options

TRENDS = {
    True: "{} holds.",
    False: "{} does not hold here.",
    None: "Differences are within the noise. {} is open.",
}
RESULTS = Path(__file__).parent / "results"


def without_calibration(options: Options, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Local files of test sets, without the documents that models are calibrated on, and a note on each."""
    data, notes = dict(options.measures.data), []
    for name, file in data.items():
        if not file.endswith(".jsonl"):
            notes.append(f"{name} is {Path(file).name}")
            continue
        calibrated = {text for name in texts_of(options.conditions.calibration) for text in read_documents(name)}
        documents = list(read_documents(file))
        left = [document for document in documents if document not in calibrated]
        if len(left) < len(documents):
            data[name] = str(folder / f"{name}.jsonl")
            write_file(Path(data[name]), "".join(json.dumps({"text": document}) + "\n" for document in left))
        gone = f" without {len(documents) - len(left)} documents that models are calibrated on"
        notes.append(f"{name} is {Path(file).name}{gone if len(left) < len(documents) else ''}")
    return data, notes


def write(experiment: Experiment, found: Found, folder: Path, arguments: Sequence[str]) -> None:
    """The result as JSON, Markdown and SVG.

    Args:
        experiment: what was done.
        found: what came out.
        folder: for the files, which have the experiment's name.
        arguments: the command's, for the record.
    """
    panels, verdict = experiment.panels(found), experiment.verdict(found)
    given, measures = found.options.conditions, found.options.measures
    result: dict[str, Any] = {
        "name": experiment.name,
        "title": experiment.title,
        "command": ["python", "-m", f"experiments.{experiment.name}", *shown(arguments)],
        "model": Path(given.model).name if Path(given.model).exists() else given.model,
        "calibration": f"{given.samples} × {given.seqlen} tokens of {without_folders(given.calibration)}",
        "window": measures.window,
        "max_windows": measures.max_windows,
        "limit": measures.limit,
        "notes": list(found.notes),
        "verdict": asdict(verdict),
        "rows": [one.model_dump(mode="json", exclude={"origin"}) for one in found.rows.values()],
        "settings": {
            case.label: case.recipe.model_dump(mode="json")
            for case in experiment.cases(found.options)
            if case.recipe is not None
        },
        "panels": [asdict(panel) for panel in panels],
        "machine": machine(resolve_device(given.device)),
        "versions": versions(),
        "created": now(),
    }
    write_file(folder / f"{experiment.name}.json", json.dumps(result, indent=2) + "\n")
    write_file(folder / f"{experiment.name}.md", _page(experiment, result, found))
    write_file(folder / f"{experiment.name}.svg", standalone(curves(experiment.title, panels)))


def shown(arguments: Sequence[str]) -> list[str]:
    """The command as it can be typed anywhere: files by their names, and no folder of this machine."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if argument in ("--work", "--results"):
            skip = True
        elif skip:
            skip = False
        elif not argument.startswith(("--work=", "--results=")):
            head, separator, tail = argument.rpartition("=")
            kept.append(f"{head}{separator}{Path(tail).name}" if Path(tail).exists() else argument)
    return kept


def _page(experiment: Experiment, result: Mapping[str, Any], found: Found) -> str:
    """Table, picture and verdict in Markdown."""
    measured = [result["calibration"]]
    if found.options.measures.texts:
        windows = f"windows of {result['window']} tokens"
        measured.append(f"perplexity in {windows}" + (f" (first {n})" if (n := result["max_windows"]) else ""))
    if found.options.measures.tasks:
        measured.append(f"first {result['limit']} questions of each task" if result["limit"] else "all questions")
    made_by = Origin(versions=result["versions"], machine=result["machine"]).label
    holds = TRENDS[result["verdict"]["holds"]].format(experiment.claim)
    lines = [
        f"# {result['title']}",
        "",
        markdown(list(found.rows.values()), first="case"),
        f"![{result['title']}]({result['name']}.svg)",
        "",
        f"{result['verdict']['found']} {holds}",
        "",
        f"{result['model']}, {'; '.join([*measured, *result['notes']])}. Made by {made_by}, {result['created'][:10]}:",
        f"`{' '.join(result['command'])}`.",
    ]
    return "\n".join(lines) + "\n"
