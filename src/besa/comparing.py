"""Recipes side by side, at several sparsities and seeds: one table, one plot, and the numbers as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from operator import attrgetter
from statistics import mean, stdev

from pydantic import BaseModel, ConfigDict

from besa.checkpoint.files import write_file
from besa.errors import BesaError
from besa.evaluation.questions import TASKS
from besa.machine import machine, resolve_device, versions
from besa.recipe import Recipe
from besa.record import now
from besa.report.curves import Curve, Panel, curves
from besa.report.svg import standalone
from besa.workspace import DENSE, Outcome, Workspace

NAME = "compare"
SCORES: Callable[[Outcome], dict[str, float]] = attrgetter("scores")
LABELS = {"accuracy": "mean accuracy in %"}


class Row(BaseModel):
    """A recipe at a sparsity.

    Attributes:
        recipe: its name.
        sparsity: counted in the written tensors.
        seeds: how many runs.
        mean: of every score over the seeds.
        spread: their standard deviation, where there are several and all are finite.
        values: the scores by seed.
        seconds: of pruning, mean.
    """

    model_config = ConfigDict(ser_json_inf_nan="constants")

    recipe: str
    sparsity: float
    seeds: int
    mean: dict[str, float]
    spread: dict[str, float]
    values: dict[str, list[float]]
    seconds: float | None


class Comparison(BaseModel):
    """What `compare` found.

    Attributes:
        command: what the user typed.
        model: as it was given.
        calibration: samples, tokens and text.
        window: tokens of a window.
        max_windows: used of each text.
        dense: the model that was pruned.
        rows: recipes by sparsity, in the order they were given in.
        created: when.
        machine: what it ran on.
        versions: of besa and of what the numbers depend on.
    """

    command: list[str] | None
    model: str
    calibration: str
    window: int
    max_windows: int | None
    dense: Row
    rows: list[Row]
    created: str
    machine: dict[str, object]
    versions: dict[str, str]


def compare(
    workspace: Workspace,
    recipes: Sequence[str],
    sparsities: Sequence[float],
    seeds: int,
    command: list[str] | None = None,
) -> Comparison:
    """Run what is missing of every recipe at every sparsity with the seeds 0, 1, …, and put it side by side.

    Writes `compare.json`, `compare.md` and `compare.svg` into the workspace's folder.

    Args:
        workspace: model, data, measures, and where to keep what is done.
        recipes: names of shipped ones, or YAML files.
        sparsities: shares of the prunable weights.
        seeds: of each, how many.
        command: what the user typed, for the record.

    Raises:
        BesaError: an unknown recipe, nothing to compare, or as `compress` and `evaluate`.
    """
    if not recipes or not sparsities:
        raise BesaError("There is nothing to compare: give --recipes and --sparsity.")
    asked = [Recipe.load(name, sparsity) for sparsity in sparsities for name in recipes]
    if len({(recipe.name, recipe.sparsity) for recipe in asked}) < len(asked):
        raise BesaError("Two recipes to compare have the same name: give each its own in its YAML file.")
    dense = workspace.outcome(None)
    rows = [row(recipe.name, [workspace.outcome(recipe, seed) for seed in range(seeds)]) for recipe in asked]
    given, measures = workspace.conditions, workspace.measures
    found = Comparison(
        command=command,
        model=given.model,
        calibration=f"{given.samples} × {given.seqlen} tokens of {given.calibration}",
        window=measures.window,
        max_windows=measures.max_windows,
        dense=row(DENSE, [dense]),
        rows=rows,
        created=now(),
        machine=machine(resolve_device(given.device)),
        versions=versions(),
    )
    write_file(workspace.folder / f"{NAME}.json", found.model_dump_json(indent=2) + "\n")
    write_file(workspace.folder / f"{NAME}.md", markdown([found.dense, *rows]))
    write_file(workspace.folder / f"{NAME}.svg", plot(found))
    return found


def row(recipe: str, outcomes: Sequence[Outcome], scores: Callable[[Outcome], dict[str, float]] = SCORES) -> Row:
    """Mean and spread of one recipe's outcomes.

    Args:
        recipe: its name.
        outcomes: one for each seed.
        scores: what is looked at.
    """
    each = [scores(outcome) for outcome in outcomes]
    values = {score: [found[score] for found in each] for score in each[0]}
    records = [outcome.record for outcome in outcomes if outcome.record]
    return Row(
        recipe=recipe,
        sparsity=mean(record.sparsity for record in records) if records else 0.0,
        seeds=len(outcomes),
        mean={score: mean(found) for score, found in values.items()},
        spread={score: stdev(found) for score, found in values.items() if len(found) > 1 and all(map(isfinite, found))},
        values=values,
        seconds=mean(record.seconds for record in records) if records else None,
    )


def markdown(rows: Sequence[Row], first: str = "recipe") -> str:
    """A table in Markdown; ± is the standard deviation over seeds."""
    scores = list(rows[0].mean)
    lines = [
        f"| {' | '.join([first, 'sparsity', *(LABELS.get(score, score) for score in scores), 'seconds'])} |",
        "|---" + "|---:" * (len(scores) + 2) + "|",
    ]
    for found in rows:
        cells = [found.recipe, f"{found.sparsity:.4%}", *(cell(found, score) for score in scores)]
        cells.append("" if found.seconds is None else f"{found.seconds:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(found: Row, score: str) -> str:
    """A score and its spread."""
    spread, digits = found.spread.get(score), 2 if abs(found.mean[score]) >= 1 else 4
    return f"{found.mean[score]:,.{digits}f}" + ("" if spread is None else f" ± {spread:,.{digits}f}")


def plot(found: Comparison) -> str:
    """Scores against sparsity, a line for each recipe, as an SVG document."""
    names = list(dict.fromkeys(row.recipe for row in found.rows))
    panels = []
    for score in (score for score in found.dense.mean if score not in TASKS):  # of tasks, their mean
        drawn = []
        for color, name in enumerate(names):
            own = sorted((row for row in found.rows if row.recipe == name), key=lambda row: row.sparsity)
            drawn.append(
                Curve(
                    name,
                    color,
                    [100 * row.sparsity for row in own],
                    [row.mean[score] for row in own],
                    [row.spread.get(score, 0.0) for row in own],
                )
            )
        y_label = LABELS.get(score, f"perplexity {score}")
        panels.append(Panel(drawn, "sparsity in %", y_label, (DENSE, found.dense.mean[score])))
    return standalone(curves(f"{' and '.join(names)} on {found.model}", panels))
