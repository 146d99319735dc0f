"""Ways to prune side by side: a file of rows that grows, and a table of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from besa.record import now
from besa.report.markdown import table as markdown
from besa.storage.writing import write_file
from besa.system.machine import machine, versions


@dataclass
class Rows:
    """Rows, written after each; those of a call under the same conditions are there from the beginning.

    Attributes:
        path: of the files, without suffix.
        conditions: that decide the rows.
    """

    path: Path
    conditions: dict[str, Any]

    def __post_init__(self) -> None:
        self.conditions |= {"versions": versions(), "machine": machine(torch.device("cpu"))}
        file = self.path.with_suffix(".json")
        earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        same = all(earlier.get(name) == value for name, value in self.conditions.items())
        self.found: list[dict[str, Any]] = earlier["rows"] if same else []

    def holds(self, about: Mapping[str, str]) -> bool:
        """Whether there is a row of that method and calibration."""
        return any(about.items() <= row.items() for row in self.found)

    def add(self, row: dict[str, Any]) -> None:
        """One more row; the files are written anew."""
        self.found.append(row | {"created": now()})
        self.path.parent.mkdir(exist_ok=True)
        whole = json.dumps(self.conditions | {"rows": self.found}, indent=2) + "\n"
        write_file(self.path.with_suffix(".json"), whole)
        write_file(self.path.with_suffix(".md"), table(self.found))
        print(json.dumps(row), flush=True)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; rows of one calibration and pattern stand together."""
    head = ["by", "method", "pattern", "calibration", "domains", "WikiText-2", "zeros, %", "zeros too many"]
    head += ["of a linear, %", "passes", "peak memory, GB"]
    ordered = sorted(found, key=lambda row: (row["calibration"], row["pattern"]))
    return markdown(head, [[*_about(row), *_measured(row)] for row in ordered], words=4)


def _about(row: Mapping[str, Any]) -> list[str]:
    return [row[name] for name in ("maker", "method", "pattern", "calibration")]


def _measured(row: Mapping[str, Any]) -> list[str]:
    perplexities = [f"{row['perplexity'][text]:.2f}" for text in ("domains", "wikitext2")]
    if "zeros" not in row:
        return [*perplexities, *[""] * 5]
    zeros = row["zeros"]
    return [
        *perplexities,
        f"{100 * zeros['zeros'] / zeros['weights']:.4f}",
        f"{zeros['excess']:,}",
        f"{100 * zeros['lowest']:.2f} to {100 * zeros['highest']:.2f}",
        f"{row['passes']:.2f}",
        f"{row['peak_memory_bytes'] / 1e9:.2f}",
    ]
