"""Where commands print, and where they put what is asked for as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from pydantic import BaseModel

out = Console()
err = Console(stderr=True)


def keep(result: BaseModel, file: Path | None) -> None:
    """Write a result as JSON, where `--json` asks for it.

    Raises:
        BesaError: the file cannot be written.
    """
    from besa.checkpoint.files import write_file

    if file is not None:
        write_file(file, result.model_dump_json(indent=2) + "\n")
