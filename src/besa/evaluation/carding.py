"""What an evaluation found, as the model card of a checkpoint shows it and the Hugging Face Hub reads it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

from besa.checkpoint.cards import refresh_card
from besa.checkpoint.measurements import NOTHING, Measurement, Measurements
from besa.errors import Notice
from besa.evaluation.result import EVALUATION_NAME, Evaluation
from besa.evaluation.texts import HUB, TEST_SETS
from besa.record import RECORD_NAME
from besa.storage.names import plain

# Data set on the Hub, its configuration and its split, of each task, as lm_eval's definitions name them.
TASK_SETS: dict[str, tuple[str, str | None, str]] = {
    "piqa": ("baber/piqa", None, "validation"),
    "boolq": ("aps/super_glue", "boolq", "validation"),
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
}


def update_card(folder: Path, name: str | None = None) -> None:
    """Bring the card of a checkpoint up to date with the evaluation beside it, if there is one.

    Args:
        folder: that `prune`, `pack`, `unpack` or `shrink` wrote.
        name: of its repository on the Hub, None if it has none.

    Raises:
        BesaError: the evaluation is damaged, or the card cannot be written.
    """
    path = folder / EVALUATION_NAME
    measurements = NOTHING
    if path.is_file():
        evaluation = Evaluation.read(path)
        if evaluation.may_be_of(folder):
            measurements = measurements_of(evaluation)
        else:
            warnings.warn(f"{path} is of another model, so the card does not show it.", Notice, stacklevel=2)
    refresh_card(folder, measurements, name)


def tell_card(evaluation: Path, model: str) -> None:
    """After an evaluation was written, bring the card up to date if it is of a checkpoint and lies in its folder.

    Args:
        evaluation: the file.
        model: that was evaluated.

    Raises:
        BesaError: the card cannot be written.
    """
    folder = evaluation.parent
    own = evaluation.name == EVALUATION_NAME and Path(model).is_dir() and folder.samefile(model)
    if own and (folder / RECORD_NAME).is_file():
        update_card(folder)


def measurements_of(evaluation: Evaluation) -> Measurements:
    """The numbers of an evaluation."""
    return Measurements(
        (*_perplexities(evaluation), *_accuracies(evaluation)),
        evaluation.versions.get("besa", ""),
        evaluation.created,
        tuple(evaluation.notes),
    )


def _perplexities(evaluation: Evaluation) -> Iterator[Measurement]:
    for window, by_text in [(evaluation.window, evaluation.details), *evaluation.other_windows.items()]:
        for text, found in by_text.items():
            dataset, config, split = _dataset(text, evaluation.sources.get(text, text))
            yield Measurement(
                name=text,
                dataset=dataset,
                metric="perplexity",
                value=found.perplexity,
                basis=f"{found.windows:,} windows of {window:,} tokens" + (" with BOS" if found.bos else ""),
                config=config,
                split=split,
            )


def _dataset(text: str, source: str) -> tuple[str, str | None, str | None]:
    """The data set of a text on the Hub, its configuration and its split; a plain name if it came from elsewhere."""
    if text in TEST_SETS and source in (HUB, text):
        hub = TEST_SETS[text].hub
        return str(hub["path"]), str(hub["name"]) if "name" in hub else None, str(hub["split"])
    if source.startswith("hf:"):
        dataset, config, split, *_ = [*source.removeprefix("hf:").split(":"), "", ""]
        return dataset, config or None, split or "train"
    return plain(source if text in TEST_SETS else text) or "text", None, None


def _accuracies(evaluation: Evaluation) -> Iterator[Measurement]:
    zero_shot = evaluation.zero_shot
    if zero_shot is None:
        return
    for task, found in zero_shot.tasks.items():
        dataset, config, split = TASK_SETS.get(task, (plain(task), None, None))
        basis = f"{found.questions:,} questions, zero-shot"
        scores = {"acc": (found.acc, found.acc_stderr), "acc_norm": (found.acc_norm, found.acc_norm_stderr)}
        for metric, (value, stderr) in scores.items():
            if value is not None:
                yield Measurement(task, dataset, metric, value, basis, stderr, config, split)
