"""How a packed model, and its speed, look in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Group
from rich.text import Text

from besa.cli.tables import Whole

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType

    from besa.checkpoint.packing import Packing
    from besa.runtime.timings import Bench


def packed(result: Packing, folder: Path) -> RenderableType:
    """What packing did, in two or three lines."""
    before, after = result.head_dense_bytes / 1e6, result.head_bytes / 1e6
    head = f"head and embeddings in eight bits: from {before:,.1f} to {after:,.1f} MB\n" if after else ""
    share = result.packed_bytes / max(1, result.dense_bytes)
    return Text(
        f"{folder}: {result.packed:,} of {result.linears:,} linears packed, from {result.dense_bytes / 1e6:,.1f} to "
        f"{result.packed_bytes / 1e6:,.1f} MB ({share:.3f} of the bytes)\n"
        f"{head}"
        f"weight files: from {result.file_bytes_before / 1e6:,.1f} to {result.file_bytes / 1e6:,.1f} MB"
    )


def benched(result: Bench) -> RenderableType:
    """Tokens a second by work and model, and what each model takes."""
    reference = result.models[0].name
    speeds = Whole(
        title="tokens a second, or time to the first token: median and quartiles",
        caption=f"×: to {reference} in its fastest form; limit: weights read at {result.bandwidth / 1e9:.1f} GB/s; "
        f"rounds: {result.rounds}, threads: {result.machine['threads']}",
        box=SIMPLE,
    )
    for name in ("work", "model", "form"):
        speeds.add_column(name)
    for name in ("median", "quartiles", "×", "limit", "of limit"):
        speeds.add_column(name, justify="right")
    for work in result.works():
        for model, timing, ratio in result.of(work):
            middle, low, high, limit = timing.paces()
            share = f"{timing.limit / timing.seconds:.0%}"
            speeds.add_row(work, model.name, model.form, middle, f"{low}–{high}", f"{ratio:.2f}", limit, share)
    sizes = Whole(box=SIMPLE)
    for name in ("model", "form", "dtype"):
        sizes.add_column(name)
    for name in ("file", "resident", "read by a step"):
        sizes.add_column(f"{name}, MB", justify="right")
    for model in result.models:
        resident = "" if model.resident_bytes is None else f"{model.resident_bytes / 1e6:,.0f}"
        files, step = (f"{size / 1e6:,.0f}" for size in (model.file_bytes, model.step_bytes))
        sizes.add_row(model.name, model.form, model.dtype, files, resident, step)
    return Group(speeds, sizes)
