"""How a model that was uploaded looks in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from besa.integrations.pushing import Pushed


def pushed(result: Pushed) -> RenderableType:
    """Where a checkpoint is, and what is not there."""
    lines = [f"{result.url}: {len(result.files)} files in commit {result.commit}"]
    if not result.changed:
        lines[0] += ", which was there already"
    if result.removed:
        lines.append(f"removed there, as this checkpoint has other weight files: {', '.join(result.removed)}")
    if result.left_out:
        lines.append(f"not uploaded, as no part of the checkpoint: {', '.join(result.left_out)}")
    return Text("\n".join(lines))
