"""The command that says what is missing: doctor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.text import Text

from besa.cli.consoles import give
from besa.cli.options import JsonOption
from besa.errors import BesaError

if TYPE_CHECKING:
    from besa.doctor import Diagnosis

commands = typer.Typer()
PANEL = "Help"
WIDTH = 12  # columns of the name of a part
COLORS = {"ok": "green", "missing": "yellow"}


@commands.command(rich_help_panel=PANEL)
def doctor(json: JsonOption = None) -> None:
    """Say what this machine has for besa, what is missing, and the command that mends it."""
    from besa.doctor import examine

    diagnosis = examine()
    give(diagnosis, _shown(diagnosis), json)
    if not diagnosis.works:
        raise BesaError(f"besa cannot work here without {', '.join(diagnosis.hindering)}: do what is said above.")


def _shown(diagnosis: Diagnosis) -> Text:
    """A line for each finding, and one for what mends it. Not in `show`, which imports what may be missing."""
    lines = []
    for finding in diagnosis.findings:
        line = Text.assemble((f"{finding.state:8}", COLORS[finding.state]), f"{finding.part:{WIDTH}} {finding.found}")
        lines.append(line)
        if finding.mend:
            lines.append(Text(f"{'':8}{'':{WIDTH}} mend: {finding.mend}"))
    return Text("\n").join(lines)
