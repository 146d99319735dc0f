"""The paper's tables and figures: what it found, and what the result files here say of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from besa.report.markdown import table
from besa.storage.names import path_of
from besa.studies.origin import Origin
from experiments.experiment import Verdict
from experiments.result import Result

HERE = Path(__file__).parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Finding:
    """A table or figure of the paper.

    Attributes:
        name: of its experiment.
        title: what it shows.
        paper: what the paper found.
        here: what was found here, None where it was not run.
        holds: whether the paper's trend is there, None where that is open.
        model: on which it was run.
        date: when.
        origin: what made it.
    """

    name: str
    title: str
    paper: str
    here: str | None = None
    holds: bool | None = None
    model: str = ""
    date: str = ""
    origin: Origin | None = None

    @property
    def about(self) -> str:
        """Model and date, as far as they are known."""
        return ", ".join(part for part in (self.model, self.date) if part)

    @property
    def trend(self) -> str:
        """Whether the trend holds, in words."""
        if self.here is None:
            return "not run"
        return "open" if self.holds is None else "yes" if self.holds else "no"


def findings(results: Path = RESULTS) -> list[Finding]:
    """All tables and figures, with what is found in `results` (one folder each).

    Raises:
        BesaError: a result file is damaged, or there can be no such folder.
    """
    results = path_of(results)
    listed = yaml.safe_load((HERE / "paper.yaml").read_text(encoding="utf-8"))
    return [_found(Finding(entry["name"], entry["title"], entry["found"]), results) for entry in listed]


def _found(finding: Finding, results: Path) -> Finding:
    path = results / finding.name / f"{finding.name}.json"
    if not path.is_file():
        return finding
    result = Result.read(path)
    verdict = result.verdict or Verdict(f"See {path.with_suffix('.md').name}.", None)
    return replace(
        finding,
        here=verdict.found,
        holds=verdict.holds,
        model=result.model,
        date=result.created[:10],
        origin=result.origin,
    )


def listed(found: list[Finding]) -> str:
    """The tables and figures in Markdown, one a row."""
    rows = []
    for finding in found:
        about = f" ({finding.about})" if finding.about else ""
        here = "" if finding.here is None else finding.here + about
        name = f"[{finding.name}]({finding.name}/{finding.name}.md)" if finding.here is not None else finding.name
        made_by = finding.origin.label if finding.origin else ""
        rows.append([f"{name}: {finding.title}", finding.paper, here, finding.trend, made_by])
    return table(["experiment", "the paper found", "found here", "holds", "made by"], rows, words=5)
