"""The runs of an experiment: each cell is a case with a seed, is made once, and leaves a record.

Runs of the same code, inputs and settings are shared by all experiments. A killed program goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from besa.progress import Progress, silent
from besa.record import now
from besa.storage.writing import write_file
from besa.studies.origin import Origin
from besa.studies.rows import row
from besa.studies.workspace import DENSE, Workspace
from besa.system import memory
from besa.system.devices import resolve_device
from besa.system.machine import versions
from experiments.age import code_of, commit, digest
from experiments.experiment import Case, Experiment, Found, Made, Options
from experiments.joining import joined
from experiments.result import Result
from experiments.writing import without_calibration


@dataclass(frozen=True)
class Runs:
    """The cells of an experiment, in a folder that experiments share.

    Attributes:
        experiment: what is made.
        options: of its cases.
        folder: of all runs.
        command: that makes them, for the records.
        progress: told about each piece of work.
        keep: pruned weights stay, so that no run is made twice to be measured by something else.
    """

    experiment: Experiment
    options: Options
    folder: Path
    command: tuple[str, ...] = ()
    progress: Progress = silent
    keep: bool = False

    @cached_property
    def cases(self) -> list[Case]:
        """The lines of the table."""
        return self.experiment.cases(self.options)

    def cells(self, seeds: range) -> Iterator[tuple[Case, int]]:
        """The cells of some seeds; the dense model has one, which is of seed 0."""
        return ((case, seed) for seed in seeds for case in self.cases if case.recipe or seed == 0)

    def done(self, case: Case, seed: int) -> bool:
        """Whether a cell has been made by this code."""
        return self._record(case, seed).exists()

    def make(self, case: Case, seed: int) -> dict[str, Any]:
        """The record of a cell; it is made now, or gone on with, if there is none."""
        path = self._record(case, seed)
        if not path.exists():
            write_file(path, json.dumps(self._made(case, seed), indent=2) + "\n")
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record

    def found(self, seeds: int, earlier: Result | None = None) -> Found:
        """What came out of so many seeds; what is missing is made.

        Args:
            seeds: the number of them.
            earlier: a written result of the first ones, by the same code from the same inputs on any machine. They are
                made again only where runs themselves are looked at: answers to questions, and `Found.outcomes`.
        """
        new = range(self.kept(earlier), seeds)
        before = earlier if new.start else None
        cells = list(before.cells) if before else []
        for case, seed in self.cells(new):
            cells.append(self.make(case, seed) | {"label": case.label})  # cases may have the same recipe
        rows = {one.recipe: one for one in before.compared()} if before else {}
        made = {case.label: self.outcomes(case, new) for case in self.cases}
        dense = next(iter(made.get(DENSE, [])), None)
        for label, outcomes in made.items():
            if outcomes:
                found = row(label, outcomes, self.experiment.scores, dense if label != DENSE else None)
                rows[label] = joined(rows[label], found, rows.get(DENSE)) if label in rows else found
        return Found(self.options, rows, _Outcomes(self, range(seeds)), tuple(cells), tuple(self._texts[1]))

    def kept(self, earlier: Result | None) -> int:
        """How many seeds of a written result need not be made again: none where answers are compared."""
        return earlier.seeds if earlier and not self.options.measures.tasks else 0

    def outcomes(self, case: Case, seeds: range) -> list[Made]:
        """The runs of a case, one for each seed; those that are missing are made."""
        each = []
        for _, seed in (cell for cell in self.cells(seeds) if cell[0] == case):
            looked = self.make(case, seed)["looked"]
            outcome = self._workspace(case).outcome(case.recipe, seed)
            each.append(Made(outcome.record, outcome.evaluations, outcome.origin, looked))
        return each

    @cached_property
    def inputs(self) -> str:
        """A digest of model, texts and whatever else decides a result besides recipes, seeds and code."""
        return digest(self._decisive(Case(DENSE, None)))

    def needs(self, case: Case, seed: int) -> tuple[Path, set[str]]:
        """The run of a cell, and what its model is measured by; cells of other experiments may need the same."""
        measures, look = self.options.measures, self.experiment.look
        windows = f"{measures.window} × {measures.max_windows}"
        looked = {self.experiment.name} if look else set()
        run = self._folder(case) / self._workspace(case).key(case.recipe, seed)
        return run, {*(f"{text}, {windows}" for text in measures.texts), *measures.tasks, *looked}

    def _made(self, case: Case, seed: int) -> dict[str, Any]:
        """Run, measure and look."""
        began, look, device = time.perf_counter(), self.experiment.look, self.options.conditions.device
        workspace = self._workspace(case)
        checkpoint = workspace.checkpoint(case.recipe, seed) if case.recipe and look else None
        new = not workspace.done(case.recipe, seed)
        memory.reset_peak(resolve_device(device))
        outcome = replace(workspace, keep=self.keep or checkpoint is not None).outcome(case.recipe, seed)
        looked = look(checkpoint) if look and checkpoint else {}
        if checkpoint is not None and not self.keep:
            shutil.rmtree(checkpoint)
        pruned = outcome.record
        return {
            "seed": seed,
            "samples": workspace.conditions.samples,
            "run": workspace.key(case.recipe, seed),
            "command": list(self.command),
            "commit": commit(),
            "versions": versions(),
            "machine": Origin.here(device).machine,
            "created": now(),
            "seconds": time.perf_counter() - began if new else None,
            "pruning_seconds": pruned.seconds if pruned else None,
            "peak_memory_bytes": max(memory.peak_bytes() if new else 0, pruned.peak_memory_bytes if pruned else 0),
            "scores": self.experiment.scores(Made(pruned, outcome.evaluations, outcome.origin, looked)),
            "looked": looked,
        }

    def _record(self, case: Case, seed: int) -> Path:
        """Where the record of a cell is: its name covers whatever decides it."""
        decisive = self._decisive(case) | {
            "recipe": case.recipe.model_dump(mode="json") if case.recipe else None,
            "seed": seed,
            "look": code_of([case.recipe], self.experiment.module or self.experiment.name)
            if self.experiment.look
            else None,
        }
        return self._folder(case) / "cells" / f"{self.experiment.name}-{digest(decisive)}.json"

    def _folder(self, case: Case) -> Path:
        """Of runs by the present code."""
        return self.folder / digest(code_of([case.recipe]))

    def _workspace(self, case: Case) -> Workspace:
        place = (self._folder(case), case.samples or self.options.conditions.samples)
        if place not in self._workspaces:
            conditions = replace(self.options.conditions, samples=place[1])
            measures = replace(self.options.measures, data=self._texts[0])
            self._workspaces[place] = Workspace(place[0], conditions, measures, progress=self.progress)
        return self._workspaces[place]

    def _decisive(self, case: Case) -> dict[str, Any]:
        """Of the workspace of a case; what is in its files is looked at once."""
        samples = self._workspace(case).conditions.samples
        if samples not in self._inputs:
            self._inputs[samples] = self._workspace(case).decisive()
        return self._inputs[samples]

    @cached_property
    def _workspaces(self) -> dict[tuple[Path, int], Workspace]:
        return {}

    @cached_property
    def _inputs(self) -> dict[int, dict[str, Any]]:
        return {}

    @cached_property
    def _texts(self) -> tuple[dict[str, str], list[str]]:
        return without_calibration(self.options, self.folder)


class _Outcomes(Mapping[str, list[Made]]):
    """The runs of all cases by their labels; those that are missing are made when they are asked for."""

    def __init__(self, runs: Runs, seeds: range) -> None:
        self._runs, self._seeds = runs, seeds
        self._cases = {case.label: case for case in runs.cases}

    def __getitem__(self, label: str) -> list[Made]:
        return self._runs.outcomes(self._cases[label], self._seeds)

    def __iter__(self) -> Iterator[str]:
        return iter(self._cases)

    def __len__(self) -> int:
        return len(self._cases)
