"""What several sequences a learning step buy: batch against number of steps, for BESA's rates and for fine-tuning.

    python -m experiments.batches smollm2-50 --seeds 2

Writes `experiments/results/batches/STUDY.json` and `STUDY.md`. Runs go to `--work`; what this besa left there on this
machine is not done again, so an interrupted study goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer

from besa.data.mixture import without_folders
from besa.methods.recipe import Recipe
from besa.record import now
from besa.report.markdown import table
from besa.storage.writing import write_file
from besa.studies.rows import Row, cell, row
from besa.studies.workspace import Conditions, Measures, Outcome, Workspace
from besa.system.devices import resolve_device
from besa.system.machine import machine, versions
from experiments.experiment import ERRORS, errors

RESULTS = Path(__file__).parent / "results" / "batches"
TINY = Path(__file__).parent.parent / "tests" / "assets" / "tiny-llama"
STEPS, TUNING = "steps taken", "held-out loss"  # means of blocks, beside the scores of all experiments
BATCHES = (2, 4, 8)


@dataclass(frozen=True)
class Study:
    """Runs of one recipe, compared seed by seed.

    Attributes:
        conditions: of the runs.
        measures: of the evaluations.
        recipe: its name.
        sparsity: share of the prunable weights.
        cells: settings by label; the others are compared with the first.
    """

    conditions: Conditions
    measures: Measures
    recipe: str
    sparsity: float
    cells: Mapping[str, Sequence[str]]


def learning(*pairs: tuple[int, int], tolerance: float = 0.0) -> dict[str, list[str]]:
    """Cells of BESA's rates.

    Args:
        pairs: of batch and steps.
        tolerance: at which a run stops early; larger batches have shorter passes and so stop earlier.
    """
    ending = f", tolerance {tolerance:g}" if tolerance else ""
    return {
        f"batch {batch}, {steps} steps{ending}": [
            f"allocation.batch={batch}", f"allocation.steps={steps}", f"allocation.tolerance={tolerance}"
        ]
        for batch, steps in pairs
    }  # fmt: skip


def tuning(batch: int, epochs: int, rate: float = 1e-3) -> dict[str, list[str]]:
    """A cell of fine-tuning; `rate` is that of the first step."""
    settings = {"method": "adam", "batch": batch, "epochs": epochs, "rate": f"{rate:.2e}"}
    label = f"batch {batch}, {epochs} epochs, rate {rate:.2g}"
    return {label: [f"finetune.{key}={value}" for key, value in settings.items()]}


def tiny(recipe: str, sparsity: float, cells: Mapping[str, Sequence[str]]) -> Study:
    """A study of the tests' model."""
    measures = Measures((str(TINY / "heldout.txt"), "wiki"), window=128, max_windows=200)
    return Study(Conditions(str(TINY), "c4", samples=64, seqlen=128), measures, recipe, sparsity, cells)


def smollm2(cells: Mapping[str, Sequence[str]], recipe: str = "besa", seqlen: int = 256) -> Study:
    """A study of the embedded model."""
    measures = Measures(("wiki",), window=256, max_windows=40)
    return Study(Conditions("smollm2", "c4", samples=32, seqlen=seqlen), measures, recipe, 0.5, cells)


GRID = (
    learning((1, 88), (1, 176), (1, 44), (1, 22), (1, 11), *product(BATCHES, (88, 44, 22, 11)))
    | learning(*((batch, 88) for batch in BATCHES), tolerance=0.01)
)  # fmt: skip
EPOCHS = 4  # of a batch of 1
TUNINGS = (
    tuning(1, EPOCHS)
    | tuning(1, 1, 4e-3)
    | {label: own for batch in BATCHES for label, own in tuning(1, EPOCHS, 1e-3 * batch).items()}
    | {label: own for rate in (8e-3, 16e-3) for label, own in tuning(4, EPOCHS, rate).items()}
    | tuning(8, EPOCHS, 16e-3)
    | {label: own for batch in BATCHES for label, own in tuning(batch, EPOCHS).items()}
    | {label: own for batch in BATCHES for label, own in tuning(batch, EPOCHS, 1e-3 * sqrt(batch)).items()}
    | {label: own for batch in BATCHES for label, own in tuning(batch, EPOCHS, 1e-3 * batch).items()}
    | {label: own for batch in BATCHES for label, own in tuning(batch, batch * EPOCHS).items()}
)
STUDIES = {
    "tiny-50": tiny("besa", 0.5, GRID),
    "tiny-70": tiny("besa", 0.7, learning((1, 88), (1, 44), (1, 22), *product(BATCHES, (44, 22)))),
    "tiny-finetune": tiny("fast", 0.5, TUNINGS),
    "smollm2-50": smollm2(learning((1, 88), (1, 44), (4, 22), (2, 44), (8, 11), (1, 22), (4, 44))),
    "smollm2-finetune": smollm2(tuning(1, EPOCHS) | tuning(4, EPOCHS, 4e-3) | tuning(1, EPOCHS, 4e-3), "fast", 128),
}


def scores(outcome: Outcome) -> dict[str, float]:
    """Perplexities, reconstruction errors, and where a run learned: its steps, or what fine-tuning reached."""
    found = outcome.scores | errors(outcome)
    blocks = outcome.record.blocks if outcome.record else []
    if any(block.losses for block in blocks):
        found[STEPS] = mean(len(block.losses) for block in blocks)
    if any(block.finetuning for block in blocks):
        found[TUNING] = mean(min(block.finetuning) for block in blocks)
    return found


def carry_out(study: Study, name: str, seeds: int, work: Path, results: Path) -> list[Row]:
    """Run what is missing, seed by seed, and write the result after every run."""
    workspace = Workspace(work, study.conditions, study.measures)
    recipes = {label: Recipe.load(study.recipe, study.sparsity, own) for label, own in study.cells.items()}
    outcomes: dict[str, list[Outcome]] = {label: [] for label in recipes}
    rows: list[Row] = []
    for seed, (label, recipe) in product(range(seeds), recipes.items()):
        outcomes[label].append(workspace.outcome(recipe, seed))
        rows = [row(label, found, scores) for label, found in outcomes.items() if found]
        _write(study, name, rows, results)
    return rows


def change(one: Row, first: Row, score: str) -> list[float]:
    """By how much per cent a score differs from that of the first cell with the same seed, one number a seed."""
    pairs = zip(one.values[score], first.values[score], strict=False)  # of the last seed, the rest may be missing
    return [100 * (value / base - 1) for value, base in pairs]


def _write(study: Study, name: str, rows: Sequence[Row], results: Path) -> None:
    given, measures = study.conditions, study.measures
    result: dict[str, Any] = {
        "name": name,
        "command": ["python", "-m", "experiments.batches", name, "--seeds", str(rows[0].seeds)],
        "model": Path(given.model).name,
        "calibration": f"{given.samples} × {given.seqlen} tokens of {without_folders(given.calibration)}",
        "recipe": study.recipe,
        "sparsity": study.sparsity,
        "window": measures.window,
        "max_windows": measures.max_windows,
        "cells": {label: list(settings) for label, settings in study.cells.items()},
        "rows": [one.model_dump(mode="json", exclude={"origin", "settings"}) for one in rows],
        "machine": machine(resolve_device(given.device)),
        "versions": versions(),
        "created": now(),
    }
    write_file(results / f"{name}.json", json.dumps(result, indent=2) + "\n")
    write_file(results / f"{name}.md", _page(study, result, rows))


def _page(study: Study, result: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The table in Markdown; changes are against the first row, seed by seed."""
    first = rows[0]
    texts = [score for score in first.mean if score not in (*ERRORS, STEPS, TUNING)]
    compared = [*texts, ERRORS[1], *([TUNING] if TUNING in first.mean else [])]
    shown = [*([STEPS] if STEPS in first.mean else []), *compared]
    head = ["cell", "seeds", *shown, *(f"{score}, change" for score in compared)]
    cells = [
        [one.recipe, str(one.seeds), *(cell(one, score) for score in shown)]
        + [_percent(change(one, first, score)) for score in compared]
        for one in rows
    ]
    about = f"{result['model']}, recipe {study.recipe} at {study.sparsity:.0%}, {result['calibration']}; perplexity in"
    windows = f"windows of {result['window']} tokens (first {result['max_windows']})"
    return (
        f"# Batches: {result['name']}\n\n{table(head, cells)}\n{about} {windows}. ± is the standard deviation over "
        f"seeds. A change is against the first row with the same seed.\n\n`{' '.join(result['command'])}`, "
        f"{result['created'][:10]}.\n"
    )


def _percent(changes: Sequence[float]) -> str:
    spread = f" ± {stdev(changes):.1f}" if len(changes) > 1 else ""
    return f"{mean(changes):+.1f} %{spread}"


def main(
    study: Annotated[str, typer.Argument(help=f"One of {', '.join(STUDIES)}.")],
    seeds: Annotated[int, typer.Option(help="Runs of each cell.", min=1)] = 3,
    work: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("work"),
    results: Annotated[Path, typer.Option(help="Folder for results.")] = RESULTS,
) -> None:
    """Run what is missing and write the table."""
    if study not in STUDIES:
        raise typer.BadParameter(f"there is no study {study}; choose one of {', '.join(STUDIES)}.")
    carry_out(STUDIES[study], study, seeds, work, results)


if __name__ == "__main__":
    typer.run(main)
