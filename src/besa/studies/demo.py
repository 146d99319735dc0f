"""The demo: the embedded model compared by several methods at sizes that take minutes, and a page of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from besa.data.documents import check_there
from besa.data.mixture import texts_of
from besa.evaluation.texts import check_texts, spelled_out
from besa.methods.recipe import Recipe
from besa.models.source import EMBEDDED
from besa.progress import Progress, silent
from besa.report import Run, render
from besa.storage.names import path_of
from besa.storage.writing import write_file
from besa.studies.comparing import Comparison, check_folder, compare
from besa.studies.workspace import DENSE, Conditions, Measures, Workspace
from besa.system import ranks
from besa.system.devices import resolve_device

PAGE = "report.html"


@dataclass(frozen=True)
class Plan:
    """What a demo runs: methods, calibration and evaluation sizes, in tokens and windows."""

    recipes: tuple[str, ...]
    samples: int
    seqlen: int
    window: int
    max_windows: int

    def summary(self, sparsity: float) -> str:
        """The plan in a sentence."""
        return (
            f"{', '.join((DENSE, *self.recipes))} at {sparsity:.0%}, calibrated on {self.samples} × {self.seqlen} "
            f"tokens, evaluated on {self.max_windows} windows of {self.window}"
        )


QUICK = Plan(("wanda", "besa"), samples=16, seqlen=512, window=512, max_windows=20)
FULL = Plan(
    ("magnitude", "wanda", "sparsegpt", "besa-layerwise", "besa"), samples=64, seqlen=512, window=512, max_windows=40
)


@dataclass(frozen=True)
class Demo:
    """Results of a demo.

    Attributes:
        comparison: of the methods.
        checkpoints: the folder of each pruned model, by its method.
        page: the report.
    """

    comparison: Comparison
    checkpoints: dict[str, Path]
    page: Path


def check_demo(out: Path, plan: Plan, sparsity: float, texts: Sequence[str], calibration: str) -> None:
    """Check what can be known at once; arguments as of `run_demo`.

    Raises:
        BesaError: as `compare`.
    """
    check_folder(out)
    for name in plan.recipes:
        Recipe.load(name, sparsity)
    check_texts(texts, {})
    for text in texts_of(calibration):
        check_there(text)


def run_demo(
    out: Path,
    plan: Plan,
    sparsity: float,
    texts: Sequence[str],
    calibration: str = "c4",
    device: str = "auto",
    dtype: str = "auto",
    command: list[str] | None = None,
    progress: Progress = silent,
) -> Demo:
    """Compare the methods, keep their checkpoints, and write a report on them; results that `out` has are used again.

    Args:
        out: folder for checkpoints, table, plot and report, as of `compare`.
        plan: methods and sizes.
        sparsity: share of the prunable weights to set to zero.
        texts: to evaluate on, as in `evaluate`.
        calibration: text, as in `compress`.
        device: as in `compress`.
        dtype: as in `compress`.
        command: what the user typed, for the record.
        progress: told about each piece of work in turn.

    Raises:
        BesaError: as `compare`.
    """
    own_device = str(resolve_device(device))
    conditions = Conditions(EMBEDDED, calibration, plan.samples, plan.seqlen, ranks.from_first(own_device), dtype)
    measures = Measures(tuple(spelled_out(texts)), window=plan.window, max_windows=plan.max_windows)
    workspace = Workspace(path_of(out), conditions, measures, keep=True, progress=progress, device=own_device)
    comparison = compare(workspace, plan.recipes, [sparsity], seeds=1, command=command)
    recipes = [Recipe.load(name, sparsity) for name in plan.recipes]
    runs = {workspace.folder / DENSE: workspace.outcome(None)}
    runs |= {workspace.checkpoint(recipe): workspace.outcome(recipe) for recipe in recipes}
    page = out / PAGE
    if ranks.is_first():
        write_file(page, render([Run(folder, found.record, found.evaluation) for folder, found in runs.items()]))
    return Demo(comparison, {recipe.name: workspace.checkpoint(recipe) for recipe in recipes}, page)
