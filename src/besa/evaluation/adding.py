"""Evaluations of one model, measured one after another, in one file."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from besa.errors import BesaError, Notice
from besa.evaluation.result import Evaluation
from besa.evaluation.zero_shot import ZeroShot


def added(evaluation: Evaluation, path: Path) -> Evaluation:
    """An evaluation together with what a file has, if that is of the same model and was measured alike.

    Whatever was measured again replaces what was there, with what was said of it. If the file has another text of the
    same name, all that was measured on that goes. If it has something else, all of it will be replaced. A notice says
    either.

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
    if replaced := [text for text in evaluation.details if _is_another(text, earlier, evaluation)]:
        warnings.warn(
            f"{path} had another text of the name {' and another of the name '.join(replaced)}, which is replaced.",
            Notice,
            stacklevel=2,
        )
    of_texts = evaluation if evaluation.details else earlier
    return Evaluation.joined([_kept(earlier, evaluation, replaced), evaluation]).model_copy(
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


def _is_another(text: str, earlier: Evaluation, later: Evaluation) -> bool:
    """Whether two texts of one name, in windows of one length, are two: by their tokens, or by how they begin."""
    if text not in earlier.details:
        return False
    digests = earlier.details[text].sha256, later.details[text].sha256
    if None in digests:
        digests = earlier.beginnings.get(text), later.beginnings.get(text)
    return None not in digests and digests[0] != digests[1]


def _kept(earlier: Evaluation, later: Evaluation, replaced: Sequence[str]) -> Evaluation:
    """What stays of a file: all but the replaced texts, and what was said of any text or task that is there again."""
    again = [*later.details, *(later.zero_shot.tasks if later.zero_shot else ())]
    said = re.compile(rf"\bof ({'|'.join(map(re.escape, again))})(:| were\b)")
    parts = [earlier.of(text) for text in (*earlier.perplexity, None) if text not in replaced]
    notes = [note for note in earlier.notes if not said.search(note)]
    return Evaluation.joined(parts).model_copy(update={"notes": notes})


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
