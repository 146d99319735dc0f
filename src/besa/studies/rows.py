"""Rows of a table of results: the scores of a recipe, and the besa and the machine that they come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from operator import attrgetter
from statistics import mean, stdev
from typing import Any

from pydantic import BaseModel, ConfigDict

from besa.data.domains import DOMAINS
from besa.data.questions import ACCURACY
from besa.evaluation.domains import ALL
from besa.evaluation.pairing import Against, Paired, against
from besa.report.markdown import table
from besa.report.wording import INFINITE
from besa.studies.origin import Origin
from besa.studies.workspace import Outcome

SCORES: Callable[[Outcome], dict[str, float]] = attrgetter("scores")
MADE_BY = "made by"
HUGE = 1e6  # from here on, digits before the point say nothing
LABELS = {ACCURACY: "mean accuracy in %", ALL: "mean of domains"}
PAIRED = (
    "Accuracy less that of the model before pruning on the same questions, in points, with the paired standard error. "
    "Won and lost: how many answers only the recipe, and only the model before, has right, of all answers to all tasks "
    "with all seeds."
)


class Row(BaseModel):
    """A recipe at a sparsity.

    Attributes:
        recipe: its name.
        settings: of the recipe; of a dense model there are none.
        sparsity: counted in the written tensors; of the model before pruning, as it declares.
        seeds: number of runs.
        mean: of every score over the seeds.
        spread: their standard deviation, where there are several and all are finite.
        values: the scores by seed.
        ratios: of a pruned model's mean perplexities to dense, on the domains, and their geometric mean.
        seconds: of pruning, mean.
        origin: versions and machine that made it; None where a file does not say.
        paired: accuracies against those of the dense model, where both were asked the same questions.
        notes: of its runs and evaluations, a sentence each.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    recipe: str
    settings: dict[str, Any] | None = None
    sparsity: float
    seeds: int
    mean: dict[str, float]
    spread: dict[str, float]
    values: dict[str, list[float]]
    ratios: dict[str, float] = {}
    seconds: float | None
    origin: Origin | None = None
    paired: Against | None = None
    notes: list[str] = []

    @classmethod
    def of(
        cls,
        recipe: str,
        settings: dict[str, Any] | None,
        values: dict[str, list[float]],
        reference: Mapping[str, float],
        *,
        sparsity: float,
        seconds: float | None,
        origin: Origin | None,
        notes: list[str],
        paired: Against | None = None,
    ) -> Row:
        """A row from the scores of each seed and the scores of the dense model."""
        means = {score: mean(numbers) for score, numbers in values.items()}
        shared = means.keys() & reference.keys()
        return cls(
            recipe=recipe,
            settings=settings,
            sparsity=sparsity,
            seeds=len(next(iter(values.values()))),
            mean=means,
            spread={
                score: stdev(numbers)
                for score, numbers in values.items()
                if len(numbers) > 1 and all(map(isfinite, numbers))
            },
            values=values,
            ratios={score: means[score] / reference[score] for score in (*DOMAINS, ALL) if score in shared},
            seconds=seconds,
            origin=origin,
            paired=paired,
            notes=notes,
        )


def row(
    recipe: str,
    outcomes: Sequence[Outcome],
    scores: Callable[[Outcome], dict[str, float]] = SCORES,
    dense: Outcome | None = None,
) -> Row:
    """Mean and spread of one recipe's outcomes.

    Args:
        recipe: its name.
        outcomes: one for each seed, all of one origin.
        scores: names of the scores.
        dense: outcome of the dense model, to compare with.
    """
    each = [scores(outcome) for outcome in outcomes]
    values = {score: [numbers[score] for numbers in each] for score in each[0]}
    records = [outcome.record for outcome in outcomes if outcome.record]
    return Row.of(
        recipe,
        records[0].recipe if records else None,
        values,
        scores(dense) if dense else {},
        sparsity=mean(outcome.sparsity for outcome in outcomes),
        seconds=mean(record.seconds for record in records) if records else None,
        origin=outcomes[0].origin,
        paired=_paired(outcomes, dense),
        notes=_distinct(note for outcome in outcomes for note in outcome.notes),
    )


def _distinct(notes: Iterable[str]) -> list[str]:
    """Each note once, in the order in which they come first."""
    return list(dict.fromkeys(notes))


def footnotes(rows: Sequence[Row]) -> list[str]:
    """What a reader should know of rows, a sentence each, after the recipes of which it holds.

    A recipe stands with its sparsity where the sentence does not hold of all its rows.
    """
    rows_of = Counter(one.recipe for one in rows)
    found = []
    for note in _distinct(note for one in rows for note in one.notes):
        noted = [one for one in rows if note in one.notes]
        whole = {recipe for recipe, count in Counter(one.recipe for one in noted).items() if count == rows_of[recipe]}
        names = _distinct(one.recipe if one.recipe in whole else f"{one.recipe} at {one.sparsity:.4%}" for one in noted)
        found.append(f"{', '.join(names)}: {note}")
    return found


def _paired(outcomes: Sequence[Outcome], dense: Outcome | None) -> Against | None:
    """Accuracies of all outcomes against those of the dense model."""
    if dense is None or (reference := dense.evaluation.zero_shot) is None:
        return None
    asked = [outcome.evaluation.zero_shot for outcome in outcomes]
    known = [one for one in asked if one is not None]
    return against(known, reference) if len(known) == len(asked) else None


def listed(rows: Sequence[Row], earlier: Sequence[Row] = (), first: str = "recipe") -> list[list[str]]:
    """The cells of a table of rows, its head first; ± is the standard deviation over seeds.

    Args:
        rows: made by this besa on this machine.
        earlier: made by others; a second column says by which.
        first: name of the first column.
    """
    scores = list(rows[0].mean)
    head = [first, "sparsity", *(LABELS.get(score, score) for score in scores), "seconds"]
    cells = [
        [
            one.recipe,
            f"{one.sparsity:.4%}",
            *(cell(one, score) for score in scores),
            "" if one.seconds is None else f"{one.seconds:,.0f}",
        ]
        for one in (*rows, *earlier)
    ]
    if earlier:
        origins = [one.origin.label if one.origin else "an earlier besa" for one in earlier]
        made_by = [MADE_BY, *[""] * len(rows), *origins]
        return [[line[0], origin, *line[1:]] for line, origin in zip([head, *cells], made_by, strict=True)]
    return [head, *cells]


def cell(row: Row, score: str) -> str:
    """A score, its spread and its ratio to dense."""
    value, spread, ratio = row.mean[score], row.spread.get(score), row.ratios.get(score)
    if not isfinite(value):
        return INFINITE
    shape = ".2e" if abs(value) >= HUGE else ",.2f" if abs(value) >= 1 else ",.4f"
    shown = f"{value:{shape}}" + ("" if spread is None else f" ± {spread:{shape}}")
    return shown + (f" ({ratio:.3f} ×)" if ratio and isfinite(ratio) else "")  # 0 and NaN are of an infinite one


def markdown(rows: Sequence[Row], earlier: Sequence[Row] = (), first: str = "recipe") -> str:
    """The table that `listed` describes, in Markdown, and that of `listed_pairs` where there is one."""
    head, *cells = listed(rows, earlier, first)
    found, pairs = table(head, cells, words=2 if earlier else 1), listed_pairs(rows, first)
    return f"{found}\n{PAIRED}\n\n{table(pairs[0], pairs[1:])}" if pairs else found


def listed_pairs(rows: Sequence[Row], first: str = "recipe") -> list[list[str]]:
    """The cells of a table of accuracies against dense, its head first; empty where there are none.

    Args:
        rows: of which those are left out that have none.
        first: name of the first column.
    """
    found = [(one, one.paired) for one in rows if one.paired]
    tasks = list(dict.fromkeys(task for _, pairs in found for task in pairs.tasks))
    cells = []
    for one, pairs in found:
        mean = pairs.mean
        counts = (mean.won, mean.lost, mean.answers) if mean else ()
        cells.append(
            [
                one.recipe,
                f"{one.sparsity:.4%}",
                *(_points(pairs.tasks.get(task)) for task in tasks),
                _points(mean),
                *([f"{number:,}" for number in counts] or [""] * 3),
            ]
        )
    return [[first, "sparsity", *tasks, "mean", "won", "lost", "of"], *cells] if cells else []


def _points(pair: Paired | None) -> str:
    """A difference with its error."""
    if pair is None:
        return ""
    return f"{100 * pair.difference:+.2f}" + ("" if pair.stderr is None else f" ± {100 * pair.stderr:.2f}")
