"""The demo: prune the embedded model by several methods, evaluate each, and put them on one page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from besa.api import compress, evaluate
from besa.data.calibration import sample
from besa.errors import BesaError
from besa.evaluation.result import Evaluation
from besa.evaluation.texts import read_texts
from besa.methods.recipe import Recipe
from besa.models.loading import EMBEDDED, load_tokenizer, locate
from besa.progress import Progress, labelled, silent
from besa.record import RECORD_NAME, RunRecord
from besa.report import load_run, render
from besa.storage.names import path_of
from besa.storage.writing import write_file
from besa.system.machine import resolve_device

PLAN_NAME = "besa_demo.json"
EVALUATION_NAME = "besa_eval.json"
DENSE = "dense"


@dataclass(frozen=True)
class Plan:
    """What a demo runs: methods, calibration and evaluation sizes, in tokens and windows."""

    recipes: tuple[str, ...]
    samples: int
    seqlen: int
    window: int
    max_windows: int
    seed: int = 0

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
class Row:
    """One method's line of the demo's table; a dense model has no record."""

    method: str
    record: RunRecord | None
    evaluation: Evaluation


def run_demo(
    out: Path,
    plan: Plan,
    sparsity: float,
    texts: list[str],
    calibration: str = "c4",
    device: str = "cpu",
    dtype: str = "auto",
    progress: Progress = silent,
) -> tuple[Path, list[Row]]:
    """Prune, evaluate and report; what an interrupted demo of the same plan left in `out` is used, not done again.

    Args:
        out: folder for one checkpoint per method and ``report.html``.
        plan: methods and sizes.
        sparsity: share of the prunable weights to set to zero.
        texts: to evaluate on, as in `evaluate`.
        calibration: text, as in `compress`.
        device: ``cpu`` or ``cuda``.
        dtype: as in `compress`.
        progress: told about each piece of work in turn.

    Returns:
        The report's path, and a row for each method.

    Raises:
        BesaError: `out` holds something else, or as `compress` and `evaluate` do.
    """
    for recipe in plan.recipes:
        Recipe.load(recipe, sparsity)
    resolve_device(device)
    read_texts(texts, {}, progress)
    tokenizer = load_tokenizer(locate(EMBEDDED, progress))
    tokens = sample(calibration, tokenizer, plan.samples, plan.seqlen, plan.seed, progress)
    settings = asdict(plan) | {"sparsity": sparsity, "texts": texts, "calibration": calibration, "dtype": dtype}
    rows = []
    with _claimed(path_of(out), settings):
        for method in (DENSE, *plan.recipes):
            folder = out / method
            step = labelled(progress, method)
            if method != DENSE and not folder.exists():
                compress(
                    EMBEDDED,
                    method,
                    tokens,
                    out=folder,
                    resume=True,
                    sparsity=sparsity,
                    seed=plan.seed,
                    device=device,
                    dtype=dtype,
                    progress=step,
                )
            model = EMBEDDED if method == DENSE else folder
            rows.append(Row(method, _record(folder), _evaluation(model, folder, plan, texts, device, dtype, step)))
        write_file(out / "results.md", markdown(rows))
        page = out / "report.html"
        write_file(page, render([load_run(out / row.method) for row in rows]))
    return page, rows


def markdown(rows: list[Row]) -> str:
    """The demo's result as a Markdown table; × is the ratio to the dense model's perplexity."""
    dense = rows[0].evaluation
    texts = list(dense.perplexity)
    head = ["method", "sparsity", *(f"{text} | ×" for text in texts), "seconds"]
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (2 * len(texts) + 2) + "|"]
    for row in rows:
        cells = [row.method, f"{row.record.sparsity:.4%}" if row.record else "0 %"]
        for text in texts:
            value = row.evaluation.perplexity[text]
            cells += [f"{value:,.2f}", f"{value / dense.perplexity[text]:.3f}"]
        lines.append(f"| {' | '.join(cells)} | {f'{row.record.seconds:,.0f}' if row.record else ''} |")
    return "\n".join(lines) + "\n"


@contextmanager
def _claimed(out: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Mark `out` as this demo's, or see that it already is; nothing is left of it where nothing came of the demo."""
    mark, content = out / PLAN_NAME, json.dumps(settings, indent=2) + "\n"
    if not out.exists():
        write_file(mark, content)
    elif not mark.is_file() or mark.read_text(encoding="utf-8", errors="replace") != content:
        raise BesaError(f"{out} exists already and is not this demo's: choose another --out, or remove it first.")
    try:
        yield
    finally:
        if list(out.iterdir()) == [mark]:
            shutil.rmtree(out)


def _record(folder: Path) -> RunRecord | None:
    path = folder / RECORD_NAME
    return RunRecord.read(path) if path.exists() else None


def _evaluation(
    model: str | Path, folder: Path, plan: Plan, texts: list[str], device: str, dtype: str, progress: Progress
) -> Evaluation:
    """The evaluation kept beside the checkpoint, measured on the checkpoint's files if it is not there yet."""
    path = folder / EVALUATION_NAME
    if not path.exists():
        result = evaluate(
            model,
            texts,
            window=plan.window,
            max_windows=plan.max_windows,
            device=device,
            dtype=dtype,
            progress=progress,
        )
        write_file(path, result.model_dump_json(indent=2) + "\n")
    return Evaluation.model_validate_json(path.read_text(encoding="utf-8"))
