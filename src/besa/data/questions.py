"""The embedded questions of the paper's six zero-shot tasks, as rows for lm_eval's own task definitions."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from besa.data.assets import fetch
from besa.progress import Progress, silent

TASKS = ("piqa", "boolq", "hellaswag", "winogrande", "arc_easy", "arc_challenge")  # in the order of Table 2
ACCURACY = "accuracy"  # the name of their mean, beside those of texts

Row = dict[str, Any]


def questions(task: str, progress: Progress = silent) -> list[Row]:
    """The evaluation split of a task, with the columns of its data set on the Hugging Face Hub.

    Args:
        task: one of `TASKS`.
        progress: is called during the download, if one is needed; one download serves all tasks.

    Raises:
        BesaError: they cannot be fetched.
    """
    path = fetch(f"zero-shot-{task}", progress)
    if task == "boolq":
        return [_boolq_row(document) for document in _documents(path, "idx")]
    return [_arc_row(document) for document in _documents(path, "id")] if task.startswith("arc_") else _arrow(path)


def _arrow(path: Path) -> list[Row]:
    """The rows of an Arrow stream."""
    import pyarrow as pa

    with path.open("rb") as file, pa.ipc.open_stream(file) as stream:
        rows: list[Row] = stream.read_all().to_pylist()
    return rows


def _documents(path: Path, key: str) -> list[Row]:
    """The questions of a file of requests, one per line; each question has several requests, and a `key` of its own."""
    documents: dict[Any, Row] = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            document = json.loads(line)["doc"]
            documents.setdefault(document[key], document)
    return list(documents.values())


def _boolq_row(document: Row) -> Row:
    """The columns of SuperGLUE, whose passages begin with a title; those of the first publication have none."""
    passage, _, question = document["query"].rpartition("\nQuestion: ")
    right = document["choices"][document["gold"]]
    return {"passage": passage, "question": question.removesuffix("?\nAnswer:"), "label": int(right == "yes")}


def _arc_row(document: Row) -> Row:
    labels = [chr(ord("A") + place) for place in range(len(document["choices"]))]
    return {
        "id": document["id"],
        "question": document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": document["choices"], "label": labels},
        "answerKey": labels[document["gold"]],
    }
