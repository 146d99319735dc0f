"""The files that an experiment writes: JSON with everything, Markdown with table and verdict, and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from besa.data.documents import read_documents
from besa.data.mixture import parts_of, texts_of
from besa.record import now
from besa.report.curves import curves
from besa.report.svg import standalone
from besa.storage.writing import write_file
from besa.system.devices import resolve_device
from besa.system.machine import machine, versions
from experiments.age import code_of
from experiments.experiment import Found, Options
from experiments.items import Item
from experiments.judging import RULE
from experiments.result import Result
from experiments.sizes import Sizes

TRENDS = {True: "{} holds.", False: "{} does not hold here.", None: "{} is open."}
RESULTS = Path(__file__).parent / "results"
ALIKE = 20  # words in a row that two documents share by descent, not by chance
HERE = ("--work", "--results")  # options that name folders of one machine


def without_calibration(options: Options, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Local files of test sets, without the documents that calibration texts have too, and a note on each.

    Line breaks may differ, and parts of documents: `ALIKE` words in a row are enough.
    """
    data, notes = dict(options.measures.data), []
    for name, file in data.items():
        if not file.endswith(".jsonl"):
            notes.append(f"{name} is {Path(file).name}")
            continue
        calibrated: set[int] = set()
        for calibration in texts_of(options.conditions.calibration):
            calibrated.update(chain.from_iterable(map(_runs, read_documents(calibration))))
        documents = list(read_documents(file))
        left = [document for document in documents if calibrated.isdisjoint(_runs(document))]
        if len(left) < len(documents):
            data[name] = str(folder / f"{name}.jsonl")
            write_file(Path(data[name]), "".join(json.dumps({"text": document}) + "\n" for document in left))
        gone = f" without {len(documents) - len(left)} documents that calibration texts have too, whole or in part"
        notes.append(f"{name} is {Path(file).name}{gone if len(left) < len(documents) else ''}")
    return data, notes


def _runs(document: str) -> Iterator[int]:
    """A number for every `ALIKE` words in a row of a document, and for all words of a shorter one."""
    words = document.split()
    return (hash(tuple(words[start : start + ALIKE])) for start in range(max(1, len(words) - ALIKE + 1)))


def write(item: Item, given: Sizes, found: Found, inputs: str, folder: Path, command: Sequence[str]) -> None:
    """The result as JSON, Markdown and SVG.

    Args:
        item: what was made.
        given: its sizes.
        found: what came out.
        inputs: a digest of model and texts.
        folder: for the files, which have the item's name.
        command: that made it, for the record.
    """
    one, options = item.experiment, found.options
    panels, recipes = one.panels(found), {case.label: case.recipe for case in one.cases(options)}
    result: dict[str, Any] = {
        "name": item.name,
        "experiment": one.name,
        "title": one.title,
        "setting": {"name": item.setting.name, "words": item.setting.words},
        "command": list(command),
        "model": plain_model(options.conditions.model),
        "calibration": without_folders(options.conditions.calibration),
        "sizes": asdict(given),
        "inputs": inputs,
        "notes": list(found.notes),
        "claim": one.claim,
        "verdict": asdict(one.verdict(found)),
        "rows": [row.model_dump(mode="json", exclude={"origin"}) for row in found.rows.values()],
        "settings": {label: own.model_dump(mode="json") for label, own in recipes.items() if own is not None},
        "panels": [asdict(panel) for panel in panels],
        "table": one.table(found),
        "cells": list(found.cells),
        "code": code_of(recipes.values(), item.module),
        "commit": ", ".join(dict.fromkeys(cell["commit"] for cell in found.cells)),
        "confirmed": [],
        "machine": machine(resolve_device(options.conditions.device)),
        "versions": versions(),
        "created": now(),
    }
    write_file(folder / f"{item.name}.svg", standalone(curves(one.title, panels)))
    rewrite(result, folder)


def rewrite(result: Mapping[str, Any], folder: Path) -> None:
    """A result as JSON, and its page."""
    write_file(folder / f"{result['name']}.md", _page(result))
    write_file(folder / f"{result['name']}.json", json.dumps(result, indent=2) + "\n")


def without_folders(calibration: str) -> str:
    """The calibration texts for readers elsewhere: files by their names alone, without their folders.

    Raises:
        BesaError: as `parts_of`.
    """
    parts = parts_of(calibration)
    names = [part.source if part.source.startswith("hf:") else Path(part.source).name for part in parts]
    if len(names) == 1:
        return names[0]
    return ",".join(f"{name}:{float(part.share):.3g}" for name, part in zip(names, parts, strict=True))


def plain_model(model: str) -> str:
    """A model without the folders of this machine."""
    return Path(model).name if Path(model).exists() else model


def shown(arguments: Sequence[str]) -> list[str]:
    """The command as it can be typed anywhere: files by their names, and no folder of this machine."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if argument in HERE:
            skip = True
        elif skip:
            skip = False
        elif not argument.startswith(tuple(f"{one}=" for one in HERE)):
            head, separator, tail = argument.rpartition("=")
            kept.append(f"{head}{separator}{Path(tail).name}" if Path(tail).exists() else argument)
    return kept


def _page(result: Mapping[str, Any]) -> str:
    """Table, picture and verdict in Markdown, with all that was set."""
    sizes = Sizes(**result["sizes"] | {"points": tuple(result["sizes"]["points"])})
    measured = [f"{result['model']}, calibrated on {result['calibration']}", sizes.words, *result["notes"]]
    holds = TRENDS[result["verdict"]["holds"]].format(result["claim"])
    lines = [
        f"# {result['title']}",
        "",
        f"BESA {result['setting']['words']}.",
        "",
        result["table"],
        f"![{result['title']}]({result['name']}.svg)",
        "",
        f"{result['verdict']['found']} {holds}",
        "",
        f"{RULE}",
        "",
        f"{'; '.join(measured)}. Made by {Result.model_validate(result).made}:",
        f"`{' '.join(result['command'])}`.",
    ]
    lines += [f"Confirmed on {one['date'][:10]}: commit {one['commit']} {one['found']}." for one in result["confirmed"]]
    return "\n".join(lines) + "\n"
