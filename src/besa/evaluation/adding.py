"""Evaluations of one model, measured one after another, in one file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from besa.errors import BesaError, Notice
from besa.evaluation.result import Evaluation
from besa.evaluation.zero_shot import ZeroShot


def added(evaluation: Evaluation, path: Path) -> Evaluation:
    """An evaluation together with what a file has, if that is of the same model and was measured alike.

    Whatever was measured again replaces what was there. If the file has something else, all of it will be replaced, and
    a notice says so.

    Args:
        evaluation: that will be written to the file.
        path: of the file, which need not exist.
    """
    if not path.is_file():
        return evaluation
    try:
        earlier = Evaluation.read(path)
    except BesaError:
        warnings.warn(f"{path} was no besa evaluation, and is replaced.", Notice, stacklevel=2)
        return evaluation
    if others := list(_differences(earlier, evaluation)):
        warnings.warn(
            f"{path} had an evaluation with another {' and another '.join(others)}, which is replaced.",
            Notice,
            stacklevel=2,
        )
        return evaluation
    of_texts = evaluation if evaluation.details else earlier
    return Evaluation.joined([earlier, evaluation]).model_copy(
        update={
            "model": evaluation.model,
            "window": of_texts.window,
            "max_windows": of_texts.max_windows,
            "zero_shot": _together(earlier.zero_shot, evaluation.zero_shot),
            "seconds": (earlier.seconds or 0.0) + (evaluation.seconds or 0.0),
            "created": evaluation.created,
        }
    )


def _differences(earlier: Evaluation, later: Evaluation) -> Iterator[str]:
    """What keeps two evaluations from being one, in words."""
    if not _same_model(earlier, later):
        yield "model"
    for name in ("dtype", "bos"):
        if getattr(earlier, name) != getattr(later, name):
            yield name
    if earlier.details and later.details:
        if earlier.window != later.window:
            yield "window"
        if earlier.max_windows != later.max_windows:
            yield "number of windows"
    if _packages(earlier) != _packages(later):
        yield "version of besa or its packages"
    first, second = earlier.zero_shot, later.zero_shot
    if first and second and _settings(first) != _settings(second):
        yield "choice of questions"


def _same_model(earlier: Evaluation, later: Evaluation) -> bool:
    """Whether both are of one model. Of a folder, the path may be written in another way."""
    digests = earlier.fingerprint, later.fingerprint
    if None not in digests and digests[0] != digests[1]:
        return False
    if any(getattr(earlier, name) != getattr(later, name) for name in ("revision", "sparsity", "pruned")):
        return False
    one, other = (Path(evaluation.model).resolve() for evaluation in (earlier, later))
    return one == other or (later.pruned is not None and one.name == other.name)


def _packages(evaluation: Evaluation) -> dict[str, str]:
    """The versions that numbers depend on."""
    return {name: version for name, version in evaluation.versions.items() if name != "python"}


def _settings(asked: ZeroShot) -> tuple[str, int | None, bool, str]:
    """What accuracies depend on besides the model and the task."""
    return asked.source, asked.limit, asked.bos, asked.lm_eval


def _together(earlier: ZeroShot | None, later: ZeroShot | None) -> ZeroShot | None:
    """The accuracies of both, with the later ones of the same tasks. As many of their answers were cut each time."""
    if earlier is None or later is None:
        return earlier or later
    tasks = earlier.tasks | later.tasks
    cut = earlier.cut + sum(task.cut or 0 for name, task in later.tasks.items() if name not in earlier.tasks)
    return later.model_copy(update={"tasks": tasks, "mean": fmean(task.acc for task in tasks.values()), "cut": cut})
