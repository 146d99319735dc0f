"""Recipes side by side, at several sparsities and seeds: one table, one plot, and the numbers as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from operator import attrgetter, itemgetter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from besa.data.questions import TASKS
from besa.errors import BesaError
from besa.methods.recipe import Recipe
from besa.record import now
from besa.report.curves import Curve, Panel, curves
from besa.report.markdown import table
from besa.report.svg import standalone
from besa.storage.names import path_of
from besa.storage.writing import claimed, write_file
from besa.studies.workspace import DENSE, Outcome, Workspace
from besa.system.machine import machine, resolve_device, versions

NAME = "compare"
SCORES: Callable[[Outcome], dict[str, float]] = attrgetter("scores")
LABELS = {"accuracy": "mean accuracy in %"}


class Row(BaseModel):
    """A recipe at a sparsity.

    Attributes:
        recipe: its name.
        settings: of the recipe; of a dense model there are none.
        sparsity: counted in the written tensors.
        seeds: how many runs.
        mean: of every score over the seeds.
        spread: their standard deviation, where there are several and all are finite.
        values: the scores by seed.
        seconds: of pruning, mean.
    """

    model_config = ConfigDict(ser_json_inf_nan="constants")

    recipe: str
    settings: dict[str, Any] | None = None
    sparsity: float
    seeds: int
    mean: dict[str, float]
    spread: dict[str, float]
    values: dict[str, list[float]]
    seconds: float | None


class Comparison(BaseModel):
    """What `compare` found in a folder, now and before.

    Attributes:
        command: what the user typed last.
        model: as it was given.
        calibration: samples, tokens and text.
        window: tokens of a window.
        max_windows: used of each text.
        conditions: whatever decides a result besides recipe and seed.
        dense: the model that was pruned.
        rows: recipes by sparsity, in the order they were first given in.
        created: when.
        machine: what it ran on.
        versions: of besa and of what the numbers depend on.
    """

    command: list[str] | None
    model: str
    calibration: str
    window: int
    max_windows: int | None
    conditions: dict[str, Any]
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

    Writes `compare.json`, `compare.md` and `compare.svg` into the workspace's folder. Rows that its table has already
    stay, as long as they were made under the same conditions.

    Args:
        workspace: model, data, measures, and where to keep what is done.
        recipes: names of shipped ones, or YAML files.
        sparsities: shares of the prunable weights.
        seeds: of each, how many; a row that has more keeps them.
        command: what the user typed, for the record.

    Raises:
        BesaError: an unknown recipe, nothing to compare, a folder whose table is of something else, or where another
            process is at work, or as `compress` and `evaluate`.
    """
    if not recipes or not sparsities:
        raise BesaError("There is nothing to compare: give --recipes and --sparsity.")
    asked = [Recipe.load(name, sparsity) for sparsity in sparsities for name in recipes]
    if len({_place(recipe.model_dump()) for recipe in asked}) < len(asked):
        raise BesaError("Two recipes to compare have the same name: give each its own in its YAML file.")
    folder, conditions = path_of(workspace.folder), workspace.decisive()
    workspace.check([(None, 0), *((recipe, seed) for recipe in asked for seed in range(seeds))])
    with claimed(folder, folder):
        rows = _earlier(folder, conditions)
        wanted = [(recipe, _seeds(recipe, seeds, rows, folder)) for recipe in asked]
        dense = row(DENSE, [workspace.outcome(None)])
        for recipe, own in wanted:
            made = row(recipe.name, [workspace.outcome(recipe, seed) for seed in range(own)])
            rows[_place(made.settings)] = made
        given, measures = workspace.conditions, workspace.measures
        compared = Comparison(
            command=command,
            model=given.model,
            calibration=f"{given.samples} × {given.seqlen} tokens of {given.calibration}",
            window=measures.window,
            max_windows=measures.max_windows,
            conditions=conditions,
            dense=dense,
            rows=[rows[place] for place in sorted(rows, key=itemgetter(1))],
            created=now(),
            machine=machine(resolve_device(given.device)),
            versions=versions(),
        )
        write_file(folder / f"{NAME}.json", compared.model_dump_json(indent=2) + "\n")
        write_file(folder / f"{NAME}.md", markdown([dense, *compared.rows]))
        write_file(folder / f"{NAME}.svg", plot(compared))
    return compared


def _place(settings: dict[str, Any] | None) -> tuple[str, float]:
    """What tells rows apart: name of the recipe, and sparsity asked for."""
    assert settings is not None
    return settings["name"], settings["sparsity"]


def _earlier(folder: Path, conditions: dict[str, Any]) -> dict[tuple[str, float], Row]:
    """Rows that the table in a folder has.

    Raises:
        BesaError: they were made under other conditions, or the table cannot be read.
    """
    path = folder / f"{NAME}.json"
    try:
        found = Comparison.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError):
        raise BesaError(f"{path} is no table that rows can be added to: choose another --out.") from None
    if other := [key for key, value in conditions.items() if found.conditions.get(key) != value]:
        raise BesaError(f"The table in {folder} was made with another {' and '.join(other)}: choose another --out.")
    return {_place(row.settings): row for row in found.rows}


def _seeds(recipe: Recipe, seeds: int, rows: Mapping[tuple[str, float], Row], folder: Path) -> int:
    """How many a recipe's row shall have.

    Raises:
        BesaError: the table in `folder` has a row of another recipe by that name.
    """
    settings = recipe.model_dump(mode="json")
    found = rows.get(_place(settings))
    if found is None:
        return seeds
    if found.settings != settings:
        raise BesaError(
            f"The table in {folder} has another recipe named {recipe.name}: give each its own name in its YAML file, "
            "or choose another --out."
        )
    return max(seeds, found.seeds)


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
        settings=records[0].recipe if records else None,
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
    cells = [
        [
            found.recipe,
            f"{found.sparsity:.4%}",
            *(cell(found, score) for score in scores),
            "" if found.seconds is None else f"{found.seconds:,.0f}",
        ]
        for found in rows
    ]
    return table([first, "sparsity", *(LABELS.get(score, score) for score in scores), "seconds"], cells)


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
