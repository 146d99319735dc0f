"""Whether newer code still makes a result: one of its cells is made again, and must be equal to the digit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from besa.errors import BesaError
from besa.methods.recipe import Recipe
from besa.record import now
from besa.studies.rows import Row
from experiments.age import code_of, commit
from experiments.estimating import tokens
from experiments.experiment import Case
from experiments.result import Result
from experiments.running import Runs
from experiments.writing import rewrite


def confirm(file: Path, runs: Runs) -> str:
    """Make the cheapest cell that learns again; where it is equal, the result has the digest of the present code.

    Args:
        file: the result.
        runs: of the same experiment; they are made in a folder of their own, which goes again.

    Returns:
        What was found, in a sentence.

    Raises:
        BesaError: there is no such result, or its sizes, inputs or recipes are others than those of `runs`.
    """
    result = Result.read(file)
    case = _cheapest(runs)
    _check(result, runs, file)
    again = runs.folder / f"confirm-{file.stem}"
    shutil.rmtree(again, ignore_errors=True)
    now_found = replace(runs, folder=again).make(case, 0)["scores"]
    then = _values(result, case.label)
    shutil.rmtree(again)
    if now_found != then:
        apart = ", ".join(f"{score} {then.get(score)} then, {value} now" for score, value in now_found.items())
        raise BesaError(
            f"{file.stem} is not what the present code makes: of {case.label}, seed 0, {apart}; so make the whole "
            f"table again (python -m experiments.all --only {file.stem})."
        )
    content = json.loads(file.read_text(encoding="utf-8"))
    content["code"] = code_of([one.recipe for one in runs.cases], runs.experiment.module or runs.experiment.name)
    content["confirmed"].append({"cell": case.label, "seed": 0, "commit": commit(), "date": now()})
    rewrite(content, file.parent)
    return f"{file.stem}: {case.label}, seed 0, is equal to the digit; the result is confirmed for the present code."


def _cheapest(runs: Runs) -> Case:
    """The case with the fewest tokens, of those that learn if some do."""
    pruned = [case for case in runs.cases if case.recipe is not None]
    learning = [case for case in pruned if case.recipe.descent is not None]  # type: ignore[union-attr]
    return min(learning or pruned, key=lambda case: tokens(case, runs.options))


def _check(result: Result, runs: Runs, file: Path) -> None:
    """Whether the cells would be the same; settings that came since are at their defaults."""
    recipes: Mapping[str, Any] = {
        case.label: case.recipe.model_dump(mode="json") for case in runs.cases if case.recipe is not None
    }
    others = [
        name
        for name, differ in (
            ("inputs", result.inputs != runs.inputs),
            ("recipes", _completed(result.settings) != recipes),
        )
        if differ
    ]
    if others:
        raise BesaError(
            f"{file.stem} was made with other {' and '.join(others)}, so no cell of it can be compared: make it again "
            f"(python -m experiments.all --only {file.stem})."
        )


def _completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of recipes with all that the present code has; as they are where it knows some of them no more."""
    with suppress(ValidationError):
        return {label: Recipe.model_validate(own).model_dump(mode="json") for label, own in settings.items()}
    return dict(settings)


def _values(result: Result, label: str) -> dict[str, float]:
    """The scores of a case with seed 0."""
    return next(
        ({score: values[0] for score, values in row.values.items()} for row in map(Row.model_validate, result.rows)
         if row.recipe == label), {},
    )  # fmt: skip
