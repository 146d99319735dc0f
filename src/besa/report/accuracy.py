"""Tables of what else an evaluation found: accuracies on tasks, and perplexities in windows of other lengths."""

from __future__ import annotations

from collections.abc import Iterator

from besa.evaluation.perplexity import Perplexity
from besa.evaluation.zero_shot import Accuracy, ZeroShot
from besa.report import wording
from besa.report.figures import Table
from besa.report.results import Entry
from besa.storage.names import printable


def accuracies(entries: list[Entry]) -> list[Table]:
    """A table for all runs that were asked the same questions, in per cent."""
    answered = [(entry, entry.run.measured.zero_shot) for entry in entries if entry.run.measured]
    groups: dict[str, list[tuple[Entry, ZeroShot]]] = {}
    for entry, zero_shot in answered:
        if zero_shot is not None:
            groups.setdefault(_questions(zero_shot), []).append((entry, zero_shot))
    return [_table(questions, runs) for questions, runs in groups.items()]


def _table(questions: str, runs: list[tuple[Entry, ZeroShot]]) -> Table:
    tasks = list(dict.fromkeys(task for _, zero_shot in runs for task in zero_shot.tasks))
    rows = [
        [
            entry.label,
            entry.sparsity,
            *(_share(zero_shot.tasks.get(task)) for task in tasks),
            f"{100 * zero_shot.mean:.2f}" if list(zero_shot.tasks) == tasks else wording.NO_VALUE,
        ]
        for entry, zero_shot in runs
    ]
    caption = f"Zero-shot accuracy in % with its standard error; {questions}"
    return Table(printable(caption), ["method", "sparsity", *map(printable, tasks), "mean"], rows)


def _questions(zero_shot: ZeroShot) -> str:
    limit = f"the first {wording.count(zero_shot.limit)} questions" if zero_shot.limit else "all questions"
    return f"{limit} of each task, {zero_shot.source}, lm_eval {zero_shot.lm_eval}"


def _share(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return wording.NO_VALUE
    error = "" if accuracy.acc_stderr is None else f" ± {100 * accuracy.acc_stderr:.2f}"
    return f"{100 * accuracy.acc:.2f}{error}"


def lengths(entries: list[Entry]) -> list[Table]:
    """All lengths of windows with bits per byte, which compare between tokenizers; nothing where neither is known."""
    rows = [
        [
            entry.label,
            printable(text),
            wording.count(window),
            wording.count(measured.windows),
            wording.perplexity(measured.perplexity),
            wording.NO_VALUE if measured.bits_per_byte is None else f"{measured.bits_per_byte:.4f}",
        ]
        for entry in entries
        for window, text, measured in _windows(entry)
    ]
    head = ["method", "text", "window", "windows", "perplexity", "bits per byte"]
    return [Table("Perplexity by length of the window", head, rows)] if rows else []


def _windows(entry: Entry) -> Iterator[tuple[int, str, Perplexity]]:
    measured = entry.run.measured
    if measured is None or not (measured.other_windows or any(one.bits_per_byte for one in measured.details.values())):
        return
    for window, details in {measured.window: measured.details, **measured.other_windows}.items():
        for text, perplexity in details.items():
            yield window, text, perplexity
