"""The paper's tables and figures: what it found, and what the result files here say of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from besa.errors import BesaError
from besa.report.markdown import table
from besa.storage.names import path_of

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
    """

    name: str
    title: str
    paper: str
    here: str | None = None
    holds: bool | None = None
    model: str = ""
    date: str = ""

    @property
    def command(self) -> str:
        """What runs it."""
        return f"python -m experiments.{self.name}"

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
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        verdict = result.get("verdict") or {"found": f"See {path.with_suffix('.md').name}.", "holds": None}
        here, holds = verdict["found"], verdict["holds"]
        model, date = str(result.get("model", "")), str(result["created"])[:10]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BesaError(f"{path} is not the result of an experiment: run {finding.command} again.") from None
    return Finding(finding.name, finding.title, finding.paper, here, holds, model, date)


def listed(found: list[Finding]) -> str:
    """The tables and figures in Markdown, one a row."""
    rows = []
    for finding in found:
        about = f" ({finding.model}, {finding.date})" if finding.model else f" ({finding.date})" if finding.date else ""
        here = "" if finding.here is None else finding.here + about
        name = f"[{finding.name}]({finding.name}/{finding.name}.md)" if finding.here is not None else finding.name
        rows.append([f"{name}: {finding.title}", finding.paper, here, finding.trend])
    return table(["experiment", "the paper found", "found here", "holds"], rows, words=4)
