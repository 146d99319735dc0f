"""Make every table and figure, in order; what is done by the same code from the same inputs is kept.

    python -m experiments.all --data wikitext2=FILE --data c4=FILE --data ptb=FILE

`--list` says what is done, what is left and how long it may take. The first seed of all results comes before the second
of any, so that a program that is ended early leaves all of them. Seeds are added to a written result on any machine.
`--confirm COMMIT` is for results that are older than the present code, but not than that commit: the code of both makes
all their cells on the tests' model, and where they are equal to the digit, the result says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from besa.cli.tracking import show_progress
from besa.errors import BesaError
from besa.progress import Progress, silent
from besa.report.markdown import table
from besa.storage.writing import claimed, write_file
from besa.system.devices import named_device
from experiments import models
from experiments.age import code_of
from experiments.commands import run
from experiments.confirming import confirm
from experiments.estimating import seconds_a_token, tokens
from experiments.items import TINY, TINY_TEXT, Item, chosen, missing
from experiments.result import Result
from experiments.running import Runs
from experiments.writing import RESULTS, shown, write


@dataclass(frozen=True)
class Place:
    """Where and how results are made.

    Attributes:
        preset: of sizes.
        data: files of test sets by name.
        device: that computes.
        work: folder of runs.
        results: folder for results.
        command: for the records.
        keep: pruned weights stay.
    """

    preset: str
    data: dict[str, str]
    device: str
    work: Path
    results: Path
    command: tuple[str, ...] = ()
    keep: bool = False

    def runs(self, item: Item, progress: Progress = silent) -> Runs:
        """Of an item."""
        options = item.options(item.sizes(self.preset), self.data, self.device)
        command = ("python", "-m", "experiments.all", "--only", item.name, *self.command)
        return Runs(item.experiment, options, self.work, command, progress, self.keep)

    def file(self, item: Item) -> Path:
        """The result of an item."""
        return self.results / item.name / f"{item.name}.json"


def make(items: Sequence[Item], place: Place, progress: Progress = silent) -> None:
    """Make what is missing, seed by seed; after each seed of an item its result is written anew."""
    for seed in range(max(item.sizes(place.preset).seeds for item in items)):
        for item in items:
            given = item.sizes(place.preset)
            if missing(item.model):
                models.model(item.model, progress)
            runs = place.runs(item, progress)
            earlier = _earlier(item, place, runs)
            if seed >= given.seeds or (earlier and earlier.seeds > seed):
                continue
            found = runs.found(seed + 1, earlier)
            reached = replace(given, seeds=seed + 1)
            write(item, reached, found, runs.inputs, place.file(item).parent, runs.command)
            told = item.experiment.verdict(found).found
            print(f"{item.name}, {seed + 1} of {given.seeds} seeds: {told}", flush=True)


def _earlier(item: Item, place: Place, runs: Runs) -> Result | None:
    """The result, if there is one of the same code, inputs and settings."""
    with suppress(BesaError):
        result = Result.read(place.file(item))
        recipes = {case.label: case.recipe for case in runs.cases if case.recipe is not None}
        settings = {label: recipe.model_dump(mode="json") for label, recipe in recipes.items()}
        code = code_of(recipes.values(), item.module)
        if (result.code, result.inputs, result.settings) == (code, runs.inputs, settings):
            return result
    return None


def listed(items: Sequence[Item], place: Place) -> str:
    """What is done and left of each item, with an estimate of its time, in Markdown."""
    rows, total = [], 0.0
    measured: dict[Path, set[str]] = {}
    for item in items:
        given, runs, absent = item.sizes(place.preset), place.runs(item), missing(item.model)
        cells = list(runs.cells(range(given.seeds)))
        done = [] if absent else [one for one in cells if runs.done(*one)]
        kept = 0 if absent else runs.kept(_earlier(item, place, runs))
        speed = seconds_a_token(((runs.make(*one), tokens(one[0], runs.options)) for one in done), item.model)
        seconds = 0.0
        for case, seed in cells:
            run, needs = (Path(item.name, case.label, str(seed)), {""}) if absent else runs.needs(case, seed)
            if seed >= kept and (case, seed) not in done and not (run in measured and needs <= measured[run]):
                seconds += speed * tokens(case, runs.options)
            measured[run] = measured.get(run, set()) | needs
        total += seconds
        written = "none"
        with suppress(BesaError):
            result = Result.read(place.file(item))
            written = f"{result.seeds}{', older' if result.older() else ''}"
        rows.append([item.name, given.words, written, str(len(cells)), str(len(done)), f"{seconds / 3600:.2f}"])
    rows.append(["all", "", "", "", "", f"{total / 3600:.1f}"])
    head = ["result", "sizes", "seeds in the result", "cells", "done", "hours left"]
    about = "Hours are an estimate, without what results above need too: counted passes, at the speed of what is done."
    return f"{table(head, rows, words=3)}\n{about}"


def small_texts(work: Path) -> dict[str, str]:
    """Files of test sets for the tests' model: its own held-out text in place of each."""
    documents = Path(TINY_TEXT).read_text(encoding="utf-8").split("\n\n")
    c4 = work / "texts" / "c4.jsonl"  # not where the documents go that calibration texts do not have
    write_file(c4, "".join(json.dumps({"text": document}) + "\n" for document in documents))
    return {"wikitext2": TINY_TEXT, "ptb": TINY_TEXT, "c4": str(c4)}


def main(
    only: Annotated[list[str] | None, typer.Option(help="A result, or all of an experiment (repeatable).")] = None,
    data: Annotated[list[str] | None, typer.Option(help="NAME=FILE of a test set (repeatable).")] = None,
    small: Annotated[bool, typer.Option("--small", help="On the tests' model, in minutes.")] = False,
    paper: Annotated[bool, typer.Option("--paper", help="The paper's own sizes, for a GPU.")] = False,
    model: Annotated[str | None, typer.Option(help="In place of the models of each.")] = None,
    device: str = "auto",
    work: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("work"),
    keep: Annotated[bool, typer.Option("--keep", help="Keep pruned weights: fewer runs, more disk.")] = False,
    results: Annotated[Path | None, typer.Option(help="Folder for results.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Say what is done and left, and make nothing.")] = False,
    confirm_: Annotated[
        str | None, typer.Option("--confirm", help="Compare this code, small, with that of a COMMIT before.")
    ] = None,
) -> None:
    """Make every table and figure that is missing."""
    if small and (paper or model):
        raise BesaError("--small has a model and sizes of its own: leave out --paper and --model.")
    files = {name: file for name, _, file in (pair.partition("=") for pair in data or ())}
    if small:
        model, files = str(TINY), small_texts(work) | files
    if (small or model) and results is None:
        results = work / "results"  # those of the project are of its own models
    place = Place(
        "small" if small else "paper" if paper else "cpu",
        files,
        str(named_device(device)),
        work,
        results or RESULTS,
        tuple(argument for argument in shown(_without_only(sys.argv[1:])) if argument != "--list"),
        keep,
    )
    items = chosen(only or [], model)
    if list_:
        print(listed(items, place))
        return
    with claimed(work, work), show_progress() as progress:
        if confirm_:
            print("\n".join(confirm(items, place.results, confirm_, work)))
        else:
            make(items, place, progress)


def _without_only(arguments: Sequence[str]) -> list[str]:
    """The arguments without the names of results: a record names its own."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--only" and not argument.startswith("--only="):
            kept.append(argument)
        skip = not skip and argument == "--only"
    return kept


if __name__ == "__main__":
    run(main)
