"""Recipes side by side, at several sparsities and seeds: one table, one plot, and the numbers as JSON."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from operator import itemgetter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from besa.data.questions import ACCURACY, TASKS
from besa.errors import BesaError, Notice
from besa.methods.recipe import Recipe
from besa.record import now
from besa.report.curves import Curve, Panel, curves
from besa.report.svg import standalone
from besa.storage.names import nearest, path_of
from besa.storage.writing import LOCK, claimed, write_file
from besa.studies.leftovers import left_over
from besa.studies.origin import Origin
from besa.studies.rows import LABELS, Row, footnotes, markdown, row
from besa.studies.sharing import check_alike, share_out, tidy
from besa.studies.workspace import DENSE, Workspace
from besa.system import ranks

NAME = "compare"
GIVEN = "as given"  # the model that is pruned, if it was pruned before


class Comparison(BaseModel):
    """What `compare` found in a folder, now and before.

    Attributes:
        command: what the user typed last.
        model: as it was given.
        calibration: samples, tokens and text.
        window: tokens of a window.
        max_windows: used of each text.
        conditions: whatever decides a result besides recipe and seed.
        dense: the model that was pruned, which may have zeros already.
        rows: recipes by sparsity, in the order they were first given in.
        earlier: rows of another besa or another machine, those of its dense model among them.
        created: when.
    """

    command: list[str] | None
    model: str
    calibration: str
    window: int
    max_windows: int | None
    conditions: dict[str, Any]
    dense: Row
    rows: list[Row]
    earlier: list[Row] = []
    created: str

    @property
    def basis(self) -> str:
        """What the models were calibrated on and how they were measured, in words."""
        words = [f"calibrated on {self.calibration}"]
        if any(score not in (*TASKS, ACCURACY) for score in self.dense.mean):
            most = "" if self.max_windows is None else f", {self.max_windows:,} of each text at most"
            words.append(f"perplexity in windows of {self.window:,} tokens{most}")
        if limit := self.conditions.get("limit"):
            words.append(f"accuracy on {limit:,} questions of each task at most")
        return "; ".join(words)

    @property
    def footnotes(self) -> list[str]:
        """What a reader should know of the rows, a sentence each."""
        return footnotes([self.dense, *self.rows, *self.earlier])


def compare(
    workspace: Workspace,
    recipes: Sequence[str],
    sparsities: Sequence[float] | None,
    seeds: int,
    command: list[str] | None = None,
) -> Comparison:
    """Run every recipe at every sparsity with the seeds 0, 1, …, where results are missing, and compare all results.

    Writes `compare.json`, `compare.md` and `compare.svg` into the workspace's folder. A notice names what stopped
    commands have left there. Rows that its table has already
    stay, as long as they were made under the same conditions. Those made by another besa or on another machine are
    shown as such, and not used as results of this call.

    Ranks share the runs. Rank 0 owns the folder, and makes table and plot when all runs are done.

    Args:
        workspace: model, data, measures, and where to keep what is done.
        recipes: names of shipped recipes, or YAML files.
        sparsities: shares of the prunable weights; None for that of each recipe.
        seeds: number of seeds of each row; a row that has more keeps them.
        command: what the user typed, for the record.

    Raises:
        BesaError: an unknown recipe, nothing to compare, a folder whose table is of something else, or where another
            process is at work, ranks that differ or do not share the folder, or as `check_folder`, `compress` and
            `evaluate`.
    """
    check_folder(workspace.folder)
    asked = [None] if sparsities is None else sparsities
    if not recipes or not asked:
        raise BesaError("There is nothing to compare: name recipes, and sparsities if not their own.")
    chosen = [Recipe.load(name, sparsity) for sparsity in asked for name in recipes]
    _check_distinct(chosen)
    workspace.check([(None, 0), *((recipe, seed) for recipe in chosen for seed in range(seeds))])
    folder, conditions = path_of(workspace.folder), workspace.decisive()
    check_alike(workspace.origin)
    with _claimed(folder) if ranks.is_first() else nullcontext():
        ranks.wait()
        rows, earlier = _earlier(folder, conditions, workspace.origin)
        samples = workspace.conditions.samples
        recorded = [recipe.settled(1, samples, {}) for recipe in chosen]  # a run is done by one rank
        counts = [_seeds(recipe, seeds, rows, folder) for recipe in recorded]
        seeds_by_recipe = list(zip(chosen, counts, strict=True))
        if ranks.count() > 1:
            runs = [(recipe, seed) for recipe, count in seeds_by_recipe for seed in range(count)]
            share_out(workspace, [(None, 0), *runs])
        compared = _table(workspace, seeds_by_recipe, rows, earlier, command) if ranks.is_first() else None
        if compared and (left := left_over(folder)):
            warnings.warn(left, Notice, stacklevel=2)
        made = ranks.from_first(compared.model_dump_json() if compared else "")
    return compared or Comparison.model_validate_json(made)


def check_folder(folder: Path) -> None:
    """Check that a comparison could be kept in a folder, which need not exist.

    Raises:
        BesaError: it is or lies in a file, or is a model.
    """
    if not (place := nearest(path_of(folder))).is_dir():
        raise BesaError(f"{folder} cannot be written: {place} is no folder.")
    if (folder / "config.json").exists():
        raise BesaError(f"{folder} is the folder of a model: choose another --out.")


def _check_distinct(chosen: Sequence[Recipe]) -> None:
    """Check that each recipe has a place of its own in the table.

    Raises:
        BesaError: two have the same.
    """
    by_place: dict[tuple[str, float], Recipe] = {}
    for recipe in chosen:
        other = by_place.setdefault(_place(recipe.model_dump()), recipe)
        if other is not recipe and other == recipe:
            raise BesaError(f"{recipe.name} at {recipe.sparsity:g} is to be compared twice: name it once.")
        if other is not recipe:
            raise BesaError(f"Two recipes to compare have the name {recipe.name}: give each its own in its YAML file.")


def _table(
    workspace: Workspace,
    seeds_by_recipe: Sequence[tuple[Recipe, int]],
    rows: dict[tuple[str, float], Row],
    earlier: list[Row],
    command: list[str] | None,
) -> Comparison:
    """Run what is still missing, and write table and plot.

    Args:
        workspace: as in `compare`.
        seeds_by_recipe: the recipes, and how many seeds each shall have.
        rows: that the table has already, by their places.
        earlier: as in `Comparison`.
        command: as in `compare`.
    """
    given, measures, folder = workspace.conditions, workspace.measures, path_of(workspace.folder)
    reference = workspace.outcome(None)
    dense = row(GIVEN if reference.sparsity else DENSE, [reference])
    for recipe, count in seeds_by_recipe:
        made = row(recipe.name, [workspace.outcome(recipe, seed) for seed in range(count)], dense=reference)
        rows = rows | {_place(made.settings): made}
    compared = Comparison(
        command=command,
        model=given.model,
        calibration=f"{given.samples} × {given.seqlen} tokens of {given.calibration}"
        + (" as dialogues" if given.chat else ""),
        window=measures.window,
        max_windows=measures.max_windows,
        conditions=workspace.decisive(),
        dense=dense,
        rows=[rows[place] for place in sorted(rows, key=itemgetter(1))],
        earlier=earlier,
        created=now(),
    )
    write_file(folder / f"{NAME}.json", compared.model_dump_json(indent=2) + "\n")
    write_file(folder / f"{NAME}.md", _document(compared))
    write_file(folder / f"{NAME}.svg", plot(compared))
    return compared


def _document(compared: Comparison) -> str:
    """The table in Markdown, between its conditions and its footnotes."""
    basis = compared.basis[0].upper() + compared.basis[1:]
    made_by = f" Made by {compared.dense.origin.label}." if compared.dense.origin else ""
    notes = "".join(f"- {note}\n" for note in compared.footnotes)
    table = markdown([compared.dense, *compared.rows], compared.earlier)
    return f"# Recipes on {compared.model}\n\n{basis}.{made_by}\n\n{table}" + (f"\n{notes}" if notes else "")


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """While open, only this process has the folder; a new folder is removed if nothing came of the work."""
    new = not folder.exists()
    with claimed(folder, folder):
        tidy(folder)
        try:
            yield
        finally:
            if new and [path.name for path in folder.iterdir()] == [LOCK]:
                shutil.rmtree(folder)


def _place(settings: dict[str, Any] | None) -> tuple[str, float]:
    """Key of a row: name of the recipe, and sparsity asked for."""
    assert settings is not None
    return settings["name"], settings["sparsity"]


def _earlier(
    folder: Path, conditions: dict[str, Any], origin: Origin
) -> tuple[dict[tuple[str, float], Row], list[Row]]:
    """Rows of the table in a folder: those of this origin by key, and all those of other origins.

    Raises:
        BesaError: they were made under other conditions, or the table cannot be read.
    """
    path = folder / f"{NAME}.json"
    try:
        table = Comparison.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return {}, []
    except (OSError, ValidationError):
        raise BesaError(f"{path} is no table that rows can be added to: remove it, or choose another --out.") from None
    keys = dict.fromkeys([*conditions, *table.conditions])
    if other := [key for key in keys if table.conditions.get(key) != conditions.get(key)]:
        raise BesaError(
            f"The table in {folder} was made under other conditions ({', '.join(other)}): choose another --out."
        )
    present = {
        _place(row.settings): row for row in (*table.rows, *table.earlier) if row.origin == origin and row.settings
    }
    return present, [row for row in (table.dense, *table.rows, *table.earlier) if row.origin != origin]


def _seeds(recipe: Recipe, seeds: int, rows: Mapping[tuple[str, float], Row], folder: Path) -> int:
    """Number of seeds that the row of a recipe shall have; its settings are as in a record.

    Raises:
        BesaError: the table in `folder` has a row of another recipe by that name.
    """
    settings = recipe.model_dump(mode="json")
    earlier = rows.get(_place(settings))
    if earlier is None:
        return seeds
    if earlier.settings != settings:
        raise BesaError(
            f"The table in {folder} has another recipe named {recipe.name}: give each its own name in its YAML file, "
            "or choose another --out."
        )
    return max(seeds, earlier.seeds)


def plot(comparison: Comparison) -> str:
    """Scores against sparsity, a line for each recipe, as an SVG document; earlier rows are not drawn."""
    names = list(dict.fromkeys(row.recipe for row in comparison.rows))
    panels = []
    for score in (score for score in comparison.dense.mean if score not in TASKS):  # of tasks, their mean
        drawn = []
        for color, name in enumerate(names):
            of_recipe = sorted((row for row in comparison.rows if row.recipe == name), key=lambda row: row.sparsity)
            drawn.append(
                Curve(
                    name,
                    color,
                    [100 * row.sparsity for row in of_recipe],
                    [row.mean[score] for row in of_recipe],
                    [row.spread.get(score, 0.0) for row in of_recipe],
                )
            )
        y_label = LABELS.get(score, f"perplexity {score}")
        panels.append(Panel(drawn, "sparsity in %", y_label, (comparison.dense.recipe, comparison.dense.mean[score])))
    return standalone(curves(f"{' and '.join(names)} on {comparison.model}", panels))
