"""How what was measured of a checkpoint looks in a terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Group
from rich.text import Text

from besa.cli.tables import Whole
from besa.evaluation.domains import mean_of_domains
from besa.models.kinds import kind, shortened
from besa.simulator import described
from besa.storage.names import pinned

if TYPE_CHECKING:
    from rich.console import RenderableType

    from besa.checkpoint.inspection import Contents, LinearContents
    from besa.checkpoint.verification import Verified
    from besa.evaluation.result import Evaluation
    from besa.evaluation.zero_shot import ZeroShot
    from besa.simulator import Simulation


def evaluated(evaluation: Evaluation) -> RenderableType:
    """Perplexities and accuracies of one model."""
    tables: list[RenderableType] = []
    model = pinned(evaluation.model, evaluation.revision)
    if evaluation.details:
        table = Whole(title=model)
        table.add_column("text")
        for column in ("window", "windows", "perplexity", "bits per byte"):
            table.add_column(column, justify="right")
        for window, details in {evaluation.window: evaluation.details, **evaluation.other_windows}.items():
            for text, result in details.items():
                bits = "" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}"
                table.add_row(text, f"{window:,}", f"{result.windows:,}", f"{result.perplexity:,.3f}", bits)
            if mean := mean_of_domains({text: result.perplexity for text, result in details.items()}):
                table.add_row("mean of domains", f"{window:,}", "", f"{mean:,.3f}", "")
        tables.append(table)
    if evaluation.zero_shot is not None:
        tables.append(_answered(model, evaluation.zero_shot))
    return Group(*tables)


def _answered(model: str, result: ZeroShot) -> RenderableType:
    """Accuracies with their standard errors, in per cent."""
    table = Whole(title=model, caption=f"zero-shot, lm_eval {result.lm_eval}, questions {result.source}")
    table.add_column("task")
    for column in ("questions", "acc %", "acc_norm %"):
        table.add_column(column, justify="right")
    for task, accuracy in result.tasks.items():
        shares = [(accuracy.acc, accuracy.acc_stderr), (accuracy.acc_norm, accuracy.acc_norm_stderr)]
        table.add_row(task, f"{accuracy.questions:,}", *(_share(*share) for share in shares))
    table.add_row("mean", "", f"{100 * result.mean:.2f}", "")
    return table


def _share(share: float | None, error: float | None) -> str:
    if share is None:
        return ""
    return f"{100 * share:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def contents(result: Contents) -> RenderableType:
    """Sparsity by block (rows) and kind of linear (columns; experts of one kind together), names of linears, bytes."""
    model = pinned(result.model, result.revision)
    table = Whole(title=f"{model}: sparsity of the prunable weights in %", box=SIMPLE)
    table.add_column("block")
    by_kind: dict[str, dict[str, list[LinearContents]]] = {block.name: {} for block in result.blocks}
    for block in result.blocks:
        for linear in result.linears:
            if linear.name.startswith(f"{block.name}."):
                by_kind[block.name].setdefault(kind(linear.name, block.name), []).append(linear)
    kinds = list(dict.fromkeys(path for of_block in by_kind.values() for path in of_block))  # blocks may differ
    for name in [*map(_plain, shortened(kinds)), "all", "MB"]:
        table.add_column(name, justify="right")
    for block in result.blocks:
        cells = [_percent(by_kind[block.name].get(path, [])) for path in kinds]
        sums = (f"{100 * block.sparsity:.2f}", f"{block.bytes / 1e6:,.1f}")
        table.add_row(block.name.rpartition(".")[2], *cells, *sums)
    shares = ", ".join(f"{name} {8 * size / result.weights:.3f}" for name, size in result.parts.items())
    total = (
        f"{result.zeros:,} of {result.weights:,} weights are zero ({result.sparsity:.4%}); "
        f"{result.bytes / 1e6:,.1f} MB of prunable weights in {result.file_bytes / 1e6:,.1f} MB of files\n"
        f"{result.bits_per_weight:.3f} bits a weight: {shares}\n"
        f"linears, after the name of their block ({result.blocks[0].name}, …): {', '.join(kinds)}"
    )
    return Group(table, Text(total))


def _percent(linears: list[LinearContents]) -> str:
    """Share of zeros in linears together; empty where there are none."""
    weights = sum(math.prod(linear.shape) for linear in linears)
    return f"{100 * sum(linear.zeros for linear in linears) / weights:.2f}" if linears else ""


def _plain(name: str) -> str:
    """Name of a column: short ones go without the ending that all of them have."""
    return name if "." in name else name.removesuffix("_proj")


def verified(result: Verified, folder: Path) -> RenderableType:
    """That a checkpoint is as it was written, in one line."""
    return Text(f"{folder}: {result.files} files with {result.bytes:,} bytes are as they were written")


def simulated(simulation: Simulation) -> RenderableType:
    """Like the paper's Table 4, once for each figure: mean cycles of each kind of linear, dense and in checkpoints."""
    model = pinned(simulation.model, simulation.revision)
    table = Whole(title=f"{model}: cycles on a simulated accelerator, mean over blocks", box=SIMPLE)
    table.add_column("")
    shown = [*simulation.baselines, simulation]
    labels = [Path(one.model).name for one in shown]
    if len(set(labels)) < len(labels):
        labels = [pinned(one.model, one.revision) for one in shown]
    columns = [*simulation.kinds, simulation.block]
    for name in shortened([column.name for column in columns]):
        table.add_column(_plain(name), justify="right")
    for figure in simulation.block.each():
        table.add_row(Text(described(figure), "bold"))
        table.add_row("  dense", *(_cycles(column.dense.each()[figure]) for column in columns))
        for label, one in zip(labels, shown, strict=True):
            own = {column.name: column.each()[figure] for column in [*one.kinds, one.block]}
            table.add_row(f"  {label}", *(_cycles(own[column.name]) for column in columns))
        ratios = [column.speedup[figure] for column in columns]
        table.add_row("  speed-up", *(f"{ratio:.2f}×" if ratio else "" for ratio in ratios), end_section=True)
    table.add_row(Text("sparsity", "bold"), *(f"{column.sparsity:.2%}" for column in columns))
    return table


def _cycles(number: float) -> str:
    """In six characters or less."""
    if number < 1e3:
        return f"{number:.1f}"
    return f"{number:,.0f}" if number < 1e5 else f"{number / 1e3:.4g}k" if number < 1e6 else f"{number / 1e6:.4g}M"
