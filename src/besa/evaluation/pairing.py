"""Accuracies of two models on the same questions: their difference, and how sure it is.

Most questions are answered alike by a model and what was pruned from it. They say nothing of the difference, but make
up most of the standard error of either accuracy. So the error is taken of the difference, question by question.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from besa.evaluation.zero_shot import ZeroShot


class Paired(BaseModel):
    """The accuracy of a model less that of another on the same questions.

    Attributes:
        difference: of the shares of right answers; of several runs, their mean.
        stderr: its paired standard error, that of drawing the questions: runs are taken as they are. None if a task has
            a single question.
        won: answers that are right of the model and wrong of the other one, over all runs.
        lost: answers that are wrong of the model and right of the other one, over all runs.
        answers: number of questions, times that of runs.
    """

    difference: float
    stderr: float | None
    won: int
    lost: int
    answers: int


class Against(BaseModel):
    """A model against another one, task by task.

    Attributes:
        tasks: those of which both were asked the same questions, and the answers are known.
        mean: over all tasks; None if one of them is missing.
    """

    tasks: dict[str, Paired]
    mean: Paired | None


def against(models: Sequence[ZeroShot], other: ZeroShot, *, norm: bool = False) -> Against | None:
    """Compare accuracies question by question.

    Args:
        models: what was found of a model, or of several runs that are to be taken together; at least one.
        other: what they are compared with, say the dense model.
        norm: compare `acc_norm` instead of `acc`, over those tasks that have it.

    Returns:
        None if there is no task to compare: other questions, or a file of before answers were kept.
    """
    first, *others = [_answers(one, norm) for one in (other, *models)]
    pairs: dict[str, Paired] = {}
    if all(model.bos == other.bos for model in models):
        for task, (asked, right) in first.items():
            answers = [own[task][1] for own in others if task in own and own[task][0] == asked]
            if asked and right and [len(one) for one in answers] == [len(right)] * len(models):
                pairs[task] = paired(answers, right)
    complete = all(own.keys() == pairs.keys() for own in (first, *others))
    return Against(tasks=pairs, mean=_mean(pairs) if complete else None) if pairs else None


def _answers(found: ZeroShot, norm: bool) -> dict[str, tuple[str, str]]:
    """What was asked and which answers were right, by task; empty where a file does not say."""
    return {
        task: (one.asked or "", (one.right_norm if norm else one.right) or "")
        for task, one in found.tasks.items()
        if not norm or one.acc_norm is not None
    }


def paired(models: Sequence[str], other: str) -> Paired:
    """Compare the answers to one task.

    Args:
        models: of each run, a 1 for a right answer and a 0 for a wrong one, in the order of the questions.
        other: likewise, of the other model.
    """
    runs, questions = len(models), len(other)
    pairs = list(zip(other, zip(*models, strict=True), strict=True))
    changes = [answers.count("1") - runs * int(right) for right, answers in pairs]
    total, squares = sum(changes), sum(change**2 for change in changes)
    stderr = None
    if questions > 1:
        stderr = math.sqrt((squares - total**2 / questions) / (questions - 1) / questions) / runs
    return Paired(
        difference=total / questions / runs,
        stderr=stderr,
        won=sum(change for change in changes if change > 0),  # of a question, all runs win or all lose
        lost=-sum(change for change in changes if change < 0),
        answers=questions * runs,
    )


def _mean(pairs: Mapping[str, Paired]) -> Paired:
    """Over tasks, of which each counts alike; their questions are others, so that their errors are independent."""
    errors = [pair.stderr for pair in pairs.values()]
    known = [error for error in errors if error is not None]
    return Paired(
        difference=sum(pair.difference for pair in pairs.values()) / len(pairs),
        stderr=math.hypot(*known) / len(pairs) if len(known) == len(errors) else None,
        won=sum(pair.won for pair in pairs.values()),
        lost=sum(pair.lost for pair in pairs.values()),
        answers=sum(pair.answers for pair in pairs.values()),
    )
