"""The paper's tables and figures: what it found, and what the result files here say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from besa.report.markdown import table
from besa.storage.names import path_of
from experiments.items import Item, items
from experiments.judging import Verdict
from experiments.result import Result

HERE = Path(__file__).parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Finding:
    """A table or figure of the paper, or another result, in one setting on one model.

    Attributes:
        name: of the result.
        title: what it shows.
        paper: what the paper found.
        result: what was found here, None where it was not made.
    """

    name: str
    title: str
    paper: str = ""
    result: Result | None = None

    @property
    def here(self) -> str:
        """What was found here, with model and setting."""
        if self.result is None:
            return ""
        verdict = self.result.verdict or Verdict(f"See {self.name}.md.", None)
        return f"{verdict.found} ({self.about})"

    @property
    def about(self) -> str:
        """Model and setting."""
        assert self.result is not None
        return ", ".join(part for part in (self.result.model, self.result.setting.get("name", "")) if part)

    @property
    def trend(self) -> str:
        """Whether the trend holds, in words."""
        if self.result is None:
            return "not run"
        return self.result.verdict.words if self.result.verdict else "open"

    @property
    def note(self) -> str:
        """What made it."""
        return self.result.note if self.result else ""


def findings(results: Path = RESULTS) -> list[Finding]:
    """All tables and figures of the paper, with what is found in `results` (one folder each).

    Raises:
        BesaError: a result file is damaged, or there can be no such folder.
    """
    listed = yaml.safe_load((HERE / "paper.yaml").read_text(encoding="utf-8"))
    found = []
    for entry in listed:
        title, paper = entry["title"], entry["found"]
        own = [item for item in items() if item.experiment.name == entry["name"]]
        made = [Finding(item.name, title, paper, one) for item in own if (one := _read(item, results))]
        found += made or [Finding(entry["name"], title, paper)]
    return found


def others(results: Path = RESULTS) -> list[Finding]:
    """Results that are not the paper's."""
    paper = {finding.name for finding in findings(results)}
    return [
        Finding(item.name, item.experiment.title, result=one)
        for item in items()
        if item.name not in paper and (one := _read(item, results))
    ]


def _read(item: Item, results: Path) -> Result | None:
    path = path_of(results) / item.name / f"{item.name}.json"
    return Result.read(path) if path.is_file() else None


def listed(found: Sequence[Finding]) -> str:
    """Results in Markdown, one a row."""
    rows = []
    for finding in found:
        name = f"[{finding.name}]({finding.name}/{finding.name}.md)" if finding.result is not None else finding.name
        rows.append([f"{name}: {finding.title}", finding.paper, finding.here, finding.trend, finding.note])
    return table(["result", "the paper found", "found here", "holds", "made by"], rows, words=5)
