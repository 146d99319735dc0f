"""List the results: what the paper found, what was found here, and whether the trend holds.

`python -m experiments` in the project's folder; `python -m experiments.all` makes them.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from experiments.paper import RESULTS, Finding, findings


def listed(found: Sequence[Finding]) -> Table:
    """The results, one a row."""
    table = Table(box=SIMPLE, show_lines=True, caption="python -m experiments.all --only NAME makes one")
    for column in ("name", "the paper found", "found here", "holds", "made by"):
        table.add_column(column, overflow="fold")
    for finding in found:
        table.add_row(finding.name, f"{finding.title}. {finding.paper}", finding.here, finding.trend, finding.note)
    return table


if __name__ == "__main__":
    Console().print(listed(findings(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)))
