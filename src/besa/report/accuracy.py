"""Tables of what else an evaluation found: accuracies, also against dense, and perplexities in other windows."""

from __future__ import annotations

from collections.abc import Iterator

from besa.evaluation.pairing import Against, Paired, against
from besa.evaluation.perplexity import Perplexity
from besa.evaluation.zero_shot import Accuracy, ZeroShot
from besa.report import wording
from besa.report.figures import Table
from besa.report.results import Entry
from besa.storage.names import printable

Answered = list[tuple[Entry, ZeroShot]]


def accuracies(entries: list[Entry]) -> list[Table]:
    """For all runs that were asked the same questions, their accuracies in per cent, and the differences to dense."""
    return [
        table for questions, runs in _asked(entries).items() for table in (_table(questions, runs), *_differences(runs))
    ]


def _asked(entries: list[Entry]) -> dict[str, Answered]:
    """Runs with what they answered, by what they were asked."""
    groups: dict[str, Answered] = {}
    for entry in entries:
        if entry.run.measured and (zero_shot := entry.run.measured.zero_shot) is not None:
            groups.setdefault(_questions(zero_shot), []).append((entry, zero_shot))
    return groups


def _tasks(runs: Answered) -> list[str]:
    return list(dict.fromkeys(task for _, zero_shot in runs for task in zero_shot.tasks))


def _table(questions: str, runs: Answered) -> Table:
    tasks = _tasks(runs)
    rows = [
        [
            entry.label,
            entry.kept,
            *(_share(zero_shot.tasks.get(task)) for task in tasks),
            f"{100 * zero_shot.mean:.2f}" if zero_shot.tasks.keys() == {*tasks} else wording.NO_VALUE,
        ]
        for entry, zero_shot in runs
    ]
    caption = f"Zero-shot accuracy in % with its standard error; {questions}"
    return Table(printable(caption), ["method", "sparsity", *map(printable, tasks), "mean"], rows)


def _against_dense(runs: Answered, norm: bool = False) -> list[tuple[Entry, Against]]:
    """Every pruned model against the dense one that it was made of, if that was asked the same questions."""
    found = []
    for entry, zero_shot in runs:
        known = (
            against([zero_shot], other, norm=norm)
            for dense, other in runs
            if dense.run.dense and dense.run.origin.may_be(entry.run.origin)
        )
        pairs = None if entry.run.dense else next((one for one in known if one), None)
        if pairs:
            found.append((entry, pairs))
    return found


def _differences(runs: Answered) -> list[Table]:
    """A table of differences, none without a dense model whose answers are known."""
    tasks = _tasks(runs)
    rows = [
        [
            entry.label,
            *(_difference(pairs.tasks.get(task)) for task in tasks),
            _difference(pairs.mean if pairs.tasks.keys() == {*tasks} else None),
        ]
        for entry, pairs in _against_dense(runs)
    ]
    head = ["method", *map(printable, tasks), "mean"]
    caption = "Accuracy less that of dense on the same questions, in points, with the paired standard error"
    return [Table(caption, head, rows)] if rows else []


def changes(entries: list[Entry]) -> list[Table]:
    """For all runs that were asked the same questions, how many answers changed from right to wrong and back."""
    tables = []
    for questions, runs in _asked(entries).items():
        by_norm = dict(_against_dense(runs, norm=True))
        rows = [
            [
                entry.label,
                printable(task),
                wording.count(pair.answers),
                wording.count(pair.won),
                wording.count(pair.lost),
                _difference(pair),
                _difference(by_norm[entry].tasks.get(task) if entry in by_norm else None),
            ]
            for entry, pairs in _against_dense(runs)
            for task, pair in pairs.tasks.items()
        ]
        head = ["method", "task", "questions", "won", "lost", "acc", "acc_norm"]
        caption = "Right answers of the method only (won) and of dense only (lost), and differences in points; "
        if rows:
            tables.append(Table(printable(caption + questions), head, rows, words=2))
    return tables


def _questions(zero_shot: ZeroShot) -> str:
    limit = f"the first {wording.count(zero_shot.limit)} questions" if zero_shot.limit else "all questions"
    return f"{limit} of each task, {zero_shot.source}, lm_eval {zero_shot.lm_eval}"


def _difference(pair: Paired | None) -> str:
    return wording.NO_VALUE if pair is None else wording.points(pair.difference, pair.stderr)


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
    return [Table("Perplexity by length of the window", head, rows, words=2)] if rows else []


def _windows(entry: Entry) -> Iterator[tuple[int, str, Perplexity]]:
    measured = entry.run.measured
    if measured is None or not (measured.other_windows or any(one.bits_per_byte for one in measured.details.values())):
        return
    for window, details in {measured.window: measured.details, **measured.other_windows}.items():
        for text, perplexity in details.items():
            yield window, text, perplexity
