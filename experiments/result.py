"""The JSON of an experiment, as far as tables are made from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from besa.errors import BesaError
from besa.studies.origin import Origin
from besa.studies.rows import Row
from experiments.experiment import Verdict


class Result(BaseModel):
    """What was found, when, and by which besa on which machine.

    Attributes:
        verdict: None where there is too little to compare.
        created: when, in ISO 8601.
        model: what was pruned.
        versions: of besa and of what its numbers depend on, where the file says.
        machine: what it was made on, where the file says.
        rows: of its table; tables 3 and 4 have columns of their own.
    """

    verdict: Verdict | None = None
    created: str
    model: str = ""
    versions: dict[str, str] = {}
    machine: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read a result file.

        Raises:
            BesaError: it cannot be read, or is damaged.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValidationError, UnicodeDecodeError):
            command = f"python -m experiments.{path.stem}"
            raise BesaError(f"{path} is not the result of an experiment: run {command} again.") from None

    @property
    def origin(self) -> Origin:
        """What made it."""
        return Origin(versions=self.versions, machine=self.machine)

    def compared(self) -> list[Row]:
        """The rows of a comparison."""
        return [Row.model_validate(row) for row in self.rows]
