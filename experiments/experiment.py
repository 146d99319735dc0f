"""An experiment as data: cases to prune by, what is looked at, what is drawn, and a verdict on a claim."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from besa.data.questions import TASKS
from besa.methods.recipe import Recipe
from besa.models.finding import find_blocks
from besa.models.loading import read_config, skeleton
from besa.models.source import EMBEDDED, locate
from besa.models.whole import head_share
from besa.report.curves import Curve, Panel
from besa.studies.rows import SCORES, Row, markdown
from besa.studies.workspace import DENSE, Conditions, Measures, Outcome
from experiments.judging import Verdict, changes
from experiments.settings import DEFAULTS, PAPER, Setting


@dataclass(frozen=True)
class Options:
    """What cases are made from.

    Attributes:
        conditions: of the runs.
        measures: of the evaluations.
        points: what is varied, where something is.
        setting: of BESA.
        sparsity: share of the prunable weights, where the experiment does not vary it.
    """

    conditions: Conditions
    measures: Measures
    points: tuple[float, ...] = ()
    setting: Setting = PAPER
    sparsity: float = 0.5

    def besa(self, *settings: str, name: str = "besa", sparsity: float | None = None) -> Recipe:
        """BESA in this setting."""
        return self.setting.recipe(name, sparsity or self.sparsity, self.conditions.samples, *settings)

    def baseline(self, name: str, sparsity: float | None = None) -> Recipe:
        """A method that the settings do not change."""
        return Recipe.load(name, sparsity or self.sparsity)


@dataclass(frozen=True)
class Case:
    """A line of the table.

    Attributes:
        label: its name.
        recipe: None for the dense model.
        samples: calibration sequences, where they are not those of all.
    """

    label: str
    recipe: Recipe | None
    samples: int | None = None


@dataclass(frozen=True)
class Made(Outcome):
    """A run of a case, with what was found in its checkpoint where something was looked for."""

    looked: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What came out.

    Attributes:
        options: what was asked for.
        rows: mean and spread of each case by its label.
        outcomes: of each case by its label, one for each seed.
        cells: the record of each run, in types of JSON.
        notes: on the texts.
    """

    options: Options
    rows: dict[str, Row]
    outcomes: Mapping[str, Sequence[Made]]
    cells: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The score that is looked at first: the perplexity on the first text."""
        return next(iter(next(iter(self.rows.values())).mean))

    @property
    def drawn(self) -> list[str]:
        """The scores that are drawn: all but the accuracies of single tasks."""
        return [score for score in next(iter(self.rows.values())).mean if score not in TASKS]

    def score(self, label: str, score: str | None = None) -> float:
        """Mean of a score, by default of the first."""
        return self.rows[label].mean[score or self.text]

    def values(self, label: str, score: str | None = None) -> list[float]:
        """A score, by default the first, of each seed."""
        return self.rows[label].values[score or self.text]

    def changes(self, label: str, other: str, score: str | None = None) -> list[float]:
        """By how much per cent a case differs from another, seed by seed."""
        return changes(self.values(label, score), self.values(other, score))


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper.

    Attributes:
        name: of its files.
        title: what it shows.
        cases: the lines of its table.
        verdict: on what came out.
        panels: what is drawn of it.
        texts: perplexity is measured on.
        tasks: zero-shot accuracy is measured on.
        points: what is varied, where something is, in the paper.
        scores: what is looked at of each run.
        claim: that the verdict is on.
        settings: of BESA that it is made in.
        models: that it is made on, of `experiments.models`, or folders.
        calibration: text to calibrate on.
        sparsity: share of the prunable weights, where it is not varied.
        look: what is found in a checkpoint, in types of JSON, where its weights matter.
        table: what came out, in Markdown.
        module: that has it, where its name is another.
    """

    name: str
    title: str
    cases: Callable[[Options], list[Case]]
    verdict: Callable[[Found], Verdict]
    panels: Callable[[Found], Sequence[Panel]]
    texts: tuple[str, ...] = ("wikitext2", "c4", "ptb")
    tasks: tuple[str, ...] = ()
    points: tuple[float, ...] = ()
    scores: Callable[[Made], dict[str, float]] = SCORES
    claim: str = "The paper's trend"
    settings: tuple[Setting, ...] = (PAPER, DEFAULTS)
    models: tuple[str, ...] = (EMBEDDED,)
    calibration: str = "c4"
    sparsity: float = 0.5
    look: Callable[[Path], dict[str, Any]] | None = None
    table: Callable[[Found], str] = lambda found: markdown(list(found.rows.values()), first="case")
    module: str = ""


DENSE_CASE = Case(DENSE, None)
ERRORS = ("error, first block", "error, mean of blocks", "error, last block")


def errors(outcome: Outcome) -> dict[str, float]:
    """Reconstruction errors of a run's blocks, against the dense path."""
    found = block_errors(outcome)
    return dict(zip(ERRORS, (found[0], sum(found) / len(found), found[-1]), strict=True)) if found else {}


def block_errors(outcome: Outcome) -> list[float]:
    """The reconstruction error of every block."""
    return [block.reconstruction_error for block in outcome.record.blocks] if outcome.record else []


def at(label: str, point: float) -> str:
    """The label of a case at a sparsity."""
    return f"{label} at {100 * point:g} %"


def by_method(found: Found) -> list[Panel]:
    """A panel for each score: every case but the dense model, whose score is a line."""
    labels = [label for label in found.rows if label != DENSE]
    return [
        Panel(
            [
                Curve(
                    "",
                    0,
                    list(range(len(labels))),
                    [found.score(label, score) for label in labels],
                    _spread(found, labels, score),
                )
            ],
            "",
            score if score in ERRORS or score == "accuracy" else f"perplexity {score}",
            (DENSE, found.score(DENSE, score)) if DENSE in found.rows else None,
            ticks=labels,
        )
        for score in found.drawn
    ]


def by_sparsity(found: Found, names: Sequence[str] = ()) -> list[Panel]:
    """Perplexity on the first text against sparsity, a line for each name before `at` in the labels; by default all."""
    prefixes = names or list(dict.fromkeys(label.rpartition(" at ")[0] for label in found.rows if label != DENSE))
    drawn = []
    for color, prefix in enumerate(prefixes):
        labels = [at(prefix, point) for point in found.options.points]
        x = [100 * point for point in found.options.points]
        values = [found.score(label) for label in labels]
        drawn.append(Curve(prefix, color, x, values, _spread(found, labels, found.text)))
    return [Panel(drawn, "sparsity in %", f"perplexity {found.text}", (DENSE, found.score(DENSE)))]


def by_block(found: Found) -> list[Panel]:
    """The reconstruction error of every block, a line for each case; means over seeds."""
    drawn = []
    for color, (label, outcomes) in enumerate(found.outcomes.items()):
        each = [block_errors(outcome) for outcome in outcomes]
        means = [sum(errors_) / len(each) for errors_ in zip(*each, strict=True)]
        drawn.append(Curve(label, color, list(range(len(means))), means))
    return [Panel(drawn, "block", "reconstruction error")]


def _spread(found: Found, labels: Sequence[str], score: str) -> list[float]:
    return [found.rows[label].spread.get(score, 0.0) for label in labels]


def numbers(found: Found, labels: Sequence[str], score: str | None = None, digits: int = 2) -> str:
    """Scores in words: `wanda 64.55, besa 54.04`."""
    return ", ".join(f"{label} {found.score(label, score):,.{digits}f}" for label in labels)


def linear_names(model: str) -> dict[str, list[str]]:
    """Names of the model's linears by the name of their block, from its configuration alone."""
    return {block.name: list(block.prunables) for block in find_blocks(_skeleton(model))}


def head_of(model: str) -> float:
    """The cost of the model's head, as a share of a forward pass through all its blocks."""
    empty = _skeleton(model)
    return head_share(empty, find_blocks(empty))


def _skeleton(model: str) -> PreTrainedModel:
    source = locate(model).local(weights=False)
    return skeleton(source, read_config(source))
