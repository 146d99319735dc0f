"""Six questions for each zero-shot task, with the columns of its data set on the Hugging Face Hub."""

import gzip
import json
from pathlib import Path

import pyarrow as pa

from besa.evaluation.zero_shot import Questions, zero_shot

NOUNS = ["river", "bridge", "church", "village", "army", "station"]


def piqa(i):
    sides = {"sol1": f"Cross it by the {NOUNS[i]}.", "sol2": f"Walk around the {NOUNS[i - 1]}."}
    return {"goal": f"How do I get over the {NOUNS[i]}?", **sides, "label": i % 2}


def boolq(i):
    passage = f"{NOUNS[i].title()} -- The {NOUNS[i]} was built in 18{i}0."
    return {"question": f"is the {NOUNS[i]} old", "passage": passage, "idx": i, "label": i % 2}


def hellaswag(i):
    return {
        "ind": i, "activity_label": "Building a house", "ctx_a": f"A man looks at the {NOUNS[i]}.", "ctx_b": "he",
        "ctx": "", "endings": [f"walks [step] to the {noun}." for noun in NOUNS[:4]], "source_id": "a", "split": "val",
        "split_type": "indomain", "label": str(i % 4),
    }  # fmt: skip


def winogrande(i):
    noun = {"option1": NOUNS[i], "option2": NOUNS[i - 1]}
    return {
        "sentence": f"The {NOUNS[i]} is near the {NOUNS[i - 1]}, so the _ is old.",
        **noun,
        "answer": str(i % 2 + 1),
    }


def arc(i):
    """As on the hub, where some questions number their answers."""
    labels = ["A", "B", "C", "D"] if i % 2 else ["1", "2", "3", "4"]
    choices = {"text": [f"the {noun}" for noun in NOUNS[i % 3 : i % 3 + 4]], "label": labels}
    return {
        "id": f"q{i}",
        "question": f"What stands near the {NOUNS[i]}?",
        "choices": choices,
        "answerKey": labels[i % 4],
    }


ON_HUB = {
    "piqa": piqa,
    "boolq": boolq,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "arc_easy": arc,
    "arc_challenge": lambda i: arc(5 - i),
}


def rows(task):
    return [ON_HUB[task](i) for i in range(6)]


def write(task, folder: Path) -> Path:
    """The file of a task as the embedded ones are written."""
    if task in REQUESTS:
        path = folder / f"{task}.jsonl.gz"
        with gzip.open(path, "wt", encoding="utf-8") as file:
            for row in rows(task):
                document = REQUESTS[task](row)
                for place in range(2 * len(document["choices"])):  # every answer has two requests
                    file.write(json.dumps({"doc": document, "idx": place}) + "\n")
        return path
    table, path = pa.Table.from_pylist(rows(task)), folder / f"{task}.arrow"
    with pa.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table)
    return path


def boolq_request(row):
    query = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
    return {"idx": row["idx"], "query": query, "choices": ["yes", "no"], "gold": 1 - row["label"]}


def arc_request(row):
    gold = row["choices"]["label"].index(row["answerKey"])
    query = f"Question: {row['question']}\nAnswer:"
    return {"id": row["id"], "query": query, "choices": row["choices"]["text"], "gold": gold}


REQUESTS = {"boolq": boolq_request, "arc_easy": arc_request, "arc_challenge": arc_request}


def ask(model, tokenizer, tasks, limit=None, **asked):
    """The accuracies of a model on tasks."""
    return zero_shot(model, Questions.of(tokenizer, tasks, **asked), limit=limit)
