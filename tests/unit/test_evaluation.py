"""What an evaluation found: written, read, taken apart and joined."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from besa.errors import BesaError, Notice
from besa.evaluation.adding import added
from besa.evaluation.perplexity import Perplexity
from besa.evaluation.result import Evaluation
from besa.evaluation.zero_shot import Accuracy, ZeroShot
from besa.studies.workspace import Outcome


def evaluation(last: float = 3.0) -> Evaluation:
    """Two texts, in windows of two lengths, and a task."""
    values = {"first": 2.0, "last": last}
    details = {text: Perplexity(perplexity=value, windows=4, predicted=8) for text, value in values.items()}
    return Evaluation(
        model="tiny",
        perplexity=values,
        window=3,
        details=details,
        other_windows={5: details},
        sources=dict.fromkeys(values, "a file"),
        beginnings=dict.fromkeys(values, "whole"),
        zero_shot=ZeroShot(
            tasks={"piqa": Accuracy(acc=0.5, acc_stderr=0.1, questions=9, version=1)},
            mean=0.5,
            source="embedded",
            limit=None,
            lm_eval="0.4",
        ),
    )


def test_parts_joined_are_the_whole() -> None:
    whole = evaluation()
    assert Evaluation.joined([whole.of("first"), whole.of("last"), whole.of(None)]) == whole
    assert Evaluation.joined([whole.of("last")]).perplexity == {"last": 3.0}


def test_parts_joined_have_the_notes_of_all_once() -> None:
    parts = [Evaluation(perplexity={}, window=3, notes=notes) for notes in (["a"], ["b", "a"], [])]
    assert Evaluation.joined(parts).notes == ["a", "b"]


def of_text(content: str, *windows: int, notes: Sequence[str] = ()) -> Evaluation:
    """A text, read anew, and what is said of it."""
    by_window = {n: {"t": Perplexity(perplexity=n, windows=4, predicted=8, sha256=f"{content}{n}")} for n in windows}
    details = by_window.pop(windows[0])
    return evaluation().model_copy(
        update={
            "perplexity": {"t": float(windows[0])},
            "details": details,
            "other_windows": by_window,
            "sources": {"t": "t.txt"},
            "beginnings": {"t": content},
            "notes": list(notes),
        }
    )


def test_another_text_of_the_same_name_leaves_nothing_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_text(of_text("old", 3, 5).model_dump_json())
    again = added(of_text("old", 3), path)
    assert list(again.other_windows[5]) == ["t"]  # the same text in windows of another length
    with pytest.warns(Notice, match=r"e\.json had another text of the name t, which is replaced\.$"):
        anew = added(of_text("new", 3), path)
    assert anew.details == of_text("new", 3).details
    assert not any(anew.other_windows.values())
    assert anew.zero_shot == evaluation().zero_shot


def test_what_was_said_of_a_text_goes_when_it_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    said = [
        "The model was calibrated on documents of t: others tell more.",
        "The model was calibrated on documents of tt: x",
    ]
    of_task = "7 answers of piqa were scored without the beginning of their question."
    path.write_text(of_text("old", 3, notes=[*said, of_task]).model_dump_json())
    later = of_text("old", 3, notes=["new"]).model_copy(update={"zero_shot": None})
    assert added(later, path).notes == [said[1], of_task, "new"]
    assert added(of_tasks({"piqa": 0.5}), path).notes == [*said, "cut"]


def of_tasks(tasks: dict[str, float], **changes: object) -> Evaluation:
    asked = {name: Accuracy(acc=acc, acc_stderr=None, questions=9, version=1, cut=1) for name, acc in tasks.items()}
    settings = {"source": "embedded", "limit": None, "lm_eval": "0.4"} | changes
    return Evaluation(
        model="tiny",
        perplexity={},
        window=2048,
        notes=["cut"],
        zero_shot=ZeroShot(tasks=asked, mean=sum(tasks.values()) / len(tasks), cut=len(tasks), **settings),
        created="later",
    )


def test_what_is_measured_later_is_added(tmp_path: Path) -> None:
    path, first = tmp_path / "besa_eval.json", evaluation()
    assert added(first, path) == first  # there is no file
    path.write_text(first.model_dump_json())
    both = added(of_tasks({"boolq": 0.75}), path)
    assert (both.perplexity, both.details, both.other_windows) == (
        first.perplexity,
        first.details,
        first.other_windows,
    )
    assert (both.window, both.notes, both.created) == (3, ["cut"], "later")
    assert {name: task.acc for name, task in both.zero_shot.tasks.items()} == {"piqa": 0.5, "boolq": 0.75}
    assert (both.zero_shot.mean, both.zero_shot.cut) == (0.625, 1)
    assert added(evaluation(7.0), path).perplexity == {"first": 2.0, "last": 7.0}  # measured again
    path.write_text(of_tasks({"piqa": 0.25}).model_dump_json())
    assert added(evaluation(), path).perplexity == first.perplexity


def test_windows_of_a_part_stay_known_where_tasks_were_measured_first(tmp_path: Path) -> None:
    path = tmp_path / "besa_eval.json"
    path.write_text(of_tasks({"piqa": 0.25}).model_dump_json())
    both = added(evaluation().model_copy(update={"max_windows": 2}), path)
    assert (both.window, both.max_windows) == (3, 2)
    path.write_text(both.model_dump_json())
    assert added(of_tasks({"boolq": 0.75}), path).max_windows == 2
    with pytest.warns(Notice, match="had an evaluation with another number of windows, which is replaced"):
        assert added(evaluation(), path) == evaluation()


@pytest.mark.parametrize("kept", [True, False])  # False: in files of before, the first one's tasks have no number
def test_answers_that_were_cut_are_counted_once_where_tasks_overlap(tmp_path: Path, kept: bool) -> None:
    def cut(tasks: dict[str, int], kept: bool = True) -> Evaluation:
        part = of_tasks(dict.fromkeys(tasks, 0.5))
        for name, number in tasks.items():
            part.zero_shot.tasks[name].cut = number if kept else None
        part.zero_shot.cut = sum(tasks.values())
        return part

    path = tmp_path / "besa_eval.json"
    path.write_text(cut({"piqa": 3, "boolq": 5}, kept).model_dump_json())
    assert added(cut({"boolq": 5, "arc_easy": 2}), path).zero_shot.cut == 10
    assert added(cut({"piqa": 3}), path).zero_shot.cut == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "other"}, "another model"),
        ({"pruned": "later"}, "another model"),
        ({"fingerprint": "b" * 64}, "another model"),
        ({"dtype": "bfloat16"}, "another dtype"),
        ({"bos": "yes", "window": 4}, "another bos and another window"),
        ({"max_windows": 4}, "another number of windows"),
        ({"versions": {"torch": "9"}}, "another version of besa or its packages"),
        ({"zero_shot": of_tasks({"piqa": 0.5}, limit=3).zero_shot}, "another choice of questions"),
    ],
)
def test_an_evaluation_of_something_else_is_replaced_and_that_is_said(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    path, later = tmp_path / "besa_eval.json", evaluation().model_copy(update=changes)
    path.write_text(evaluation().model_copy(update={"fingerprint": "a" * 64}).model_dump_json())
    with pytest.warns(Notice, match=f"had an evaluation with {words}, which is replaced"):
        assert added(later, path) == later
    path.write_text("{}")
    with pytest.warns(Notice, match=r"besa_eval\.json was no besa evaluation, and is replaced"):
        assert added(later, path) == later


def test_a_pruned_model_is_known_by_its_record_wherever_its_folder_is_named_from(tmp_path: Path) -> None:
    path = tmp_path / "besa_eval.json"
    path.write_text(evaluation().model_copy(update={"model": "a/tiny", "pruned": "then"}).model_dump_json())
    later = of_tasks({"boolq": 0.75}).model_copy(update={"pruned": "then"})
    assert added(later, path).perplexity == evaluation().perplexity


@pytest.mark.parametrize("form", ['"Infinity"', "Infinity", "null"])  # today's, and those of earlier files
def test_infinite_perplexities_are_read_as_they_were_written(form: str, tmp_path: Path) -> None:
    path, hopeless = tmp_path / "besa_eval.json", evaluation(math.inf)
    text = hopeless.model_dump_json()
    json.loads(text, parse_constant=pytest.fail)  # it is JSON, which knows no constants of that kind
    path.write_text(text.replace('"Infinity"', form))
    assert Evaluation.read(path) == hopeless


def test_what_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "besa_eval.json"
    with pytest.raises(BesaError, match="cannot be read"):
        Evaluation.read(path)
    path.write_text("{}")
    with pytest.raises(BesaError, match="is not a besa evaluation: write it anew"):
        Evaluation.read(path)


def test_a_run_that_nobody_measured_has_notes_and_a_sparsity() -> None:
    outcome = Outcome(None, [])
    assert (outcome.notes, outcome.sparsity) == ([], 0.0)
