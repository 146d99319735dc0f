"""The command that shares a checkpoint: push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from besa.cli.consoles import err, give
from besa.cli.options import JsonOption, JsonProgressOption, QuietOption

commands = typer.Typer()
PANEL = "Share"


@commands.command("push", rich_help_panel=PANEL)
def push_command(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that prune, pack, unpack or shrink wrote.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Its name on the Hub: USER/NAME or ORGANISATION/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Create REPO so that only its owners see it.")] = False,
    json: JsonOption = None,
    quiet: QuietOption = False,
    json_progress: JsonProgressOption = None,
) -> None:
    """Upload a checkpoint with its card, record and measurements to the Hugging Face Hub.

    Run it again to resume an interrupted upload.
    """
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # not in its `__all__`

    from besa.cli.show.sharing import pushed
    from besa.cli.tracking import show_progress
    from besa.integrations.pushing import prepare, send

    with show_progress(quiet=quiet, json_progress=json_progress) as tracker:
        parcel = prepare(folder, repo, tracker)
    if quiet or not err.is_interactive:
        disable_progress_bars()  # those of huggingface_hub, which shows them in files too
    result = send(parcel, private)
    give(result, pushed(result), json)
