"""The JSON of a result, as far as tables are made from it, and whether the code that makes it has changed since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from besa.errors import BesaError
from besa.methods.recipe import Recipe
from besa.studies.origin import Origin
from besa.studies.rows import Row
from experiments.age import changed, code_of
from experiments.judging import Verdict

OLDER = "older than the present code"


class Confirmed(BaseModel):
    """That newer code makes the same.

    Attributes:
        commit: of the newer code.
        date: when, in ISO 8601.
        found: what it made, and that it was equal to what, in words.
    """

    commit: str
    date: str
    found: str


class Result(BaseModel):
    """What was found, when, and by which besa on which machine.

    Attributes:
        experiment: that was made.
        setting: name and words of it.
        verdict: None where there is too little to compare.
        created: when, in ISO 8601.
        model: what was pruned.
        sizes: of all runs.
        inputs: a digest of model and texts.
        command: that made it.
        versions: of besa and of what its numbers depend on, where the file says.
        machine: what it was made on, where the file says.
        commit: of besa.
        code: digests of what it depends on, by room; empty in results of before there were any.
        confirmed: whenever newer code was found to make the same.
        settings: of the recipes, by case.
        rows: of its table; results of before 0.2.0 have columns of their own in tables 3 and 4.
        cells: the record of each run.
    """

    experiment: str = ""
    setting: dict[str, str] = {}
    verdict: Verdict | None = None
    created: str
    model: str = ""
    sizes: dict[str, Any] = {}
    inputs: str = ""
    command: list[str] = []
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}
    commit: str = ""
    code: dict[str, str] = {}
    confirmed: list[Confirmed] = []
    settings: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    cells: list[dict[str, Any]] = []

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read a result file.

        Raises:
            BesaError: it cannot be read, or is damaged.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError, UnicodeDecodeError):
            command = f"python -m experiments.all --only {path.stem}"
            raise BesaError(f"{path} is not the result of an experiment: run {command} again.") from None

    @property
    def seeds(self) -> int:
        """Of every case."""
        return int(self.sizes.get("seeds", 1))

    @property
    def origin(self) -> Origin:
        """Versions and machine that made it, or its last seed."""
        return Origin(versions=self.versions, machine=self.machine)

    @property
    def made(self) -> str:
        """Which besa made it where and when, in words."""
        besa = f"besa {self.versions.get('besa', 'of an unknown version')}"
        at = f" at commit {self.commit}" if self.commit else ""
        machines = [cell["machine"] for cell in self.cells if "machine" in cell] or [self.machine]
        labels = (Origin(versions={}, machine=machine).label.partition(" on ")[2] for machine in machines)
        return f"{besa}{at} on {' and '.join(dict.fromkeys(labels))}, {self.created[:10]}"

    @property
    def note(self) -> str:
        """The same, with what is to be said of its age."""
        said = self.made
        if self.confirmed:
            last = self.confirmed[-1]
            said += f"; commit {last.commit} ({last.date[:10]}) gives identical figures on the small model of the tests"
        return f"{said}; {OLDER}" if self.older() else said

    def older(self, root: Path | None = None) -> list[str]:
        """The rooms of the code that have changed since, with what a file without digests stands for: all.

        Args:
            root: of the project whose code is looked at, by default this one.
        """
        if not self.code:
            return ["all"]
        try:
            recipes = self.recipes
        except ValidationError:
            return ["methods"]
        module = "batches" if self.experiment.startswith("batches-") else self.experiment
        return changed(self.code, code_of(recipes, module, *([root] if root else [])))

    @property
    def recipes(self) -> list[Recipe]:
        """Of its cases; settings that came since are at their defaults."""
        return [Recipe.model_validate(settings) for settings in self.settings.values()]

    def compared(self) -> list[Row]:
        """The rows of a comparison."""
        return [Row.model_validate(row) for row in self.rows]
