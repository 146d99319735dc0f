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
    asked = [(entry, entry.run.measured.zero_shot) for entry in entries if entry.run.measured]
    groups: dict[str, list[tuple[Entry, ZeroShot]]] = {}
    for entry, found in asked:
        if found is not None:
            groups.setdefault(_questions(found), []).append((entry, found))
    return [_table(questions, runs) for questions, runs in groups.items()]


def _table(questions: str, runs: list[tuple[Entry, ZeroShot]]) -> Table:
    tasks = list(dict.fromkeys(task for _, found in runs for task in found.tasks))
    rows = [
        [
            entry.label,
            entry.sparsity,
            *(_share(found.tasks.get(task)) for task in tasks),
            f"{100 * found.mean:.2f}" if list(found.tasks) == tasks else wording.NO_VALUE,
        ]
        for entry, found in runs
    ]
    caption = f"Zero-shot accuracy in % with its standard error; {questions}"
    return Table(printable(caption), ["method", "sparsity", *map(printable, tasks), "mean"], rows)


def _questions(found: ZeroShot) -> str:
    limit = f"the first {wording.count(found.limit)} questions" if found.limit else "all questions"
    return f"{limit} of each task, {found.source}, lm_eval {found.lm_eval}"


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
            wording.count(found.windows),
            wording.perplexity(found.perplexity),
            wording.NO_VALUE if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}",
        ]
        for entry in entries
        for window, text, found in _found(entry)
    ]
    head = ["method", "text", "window", "windows", "perplexity", "bits per byte"]
    return [Table("Perplexity by length of the window", head, rows)] if rows else []


def _found(entry: Entry) -> Iterator[tuple[int, str, Perplexity]]:
    measured = entry.run.measured
    if measured is None or not (measured.other_windows or any(own.bits_per_byte for own in measured.details.values())):
        return
    for window, details in {measured.window: measured.details, **measured.other_windows}.items():
        for text, found in details.items():
            yield window, text, found
