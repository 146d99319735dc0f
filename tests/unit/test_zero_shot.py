"""The embedded questions scored as lm_eval scores its own data sets, to the last digit, on the tiny Llama."""

import sys
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import besa
from besa.data import questions as embedded
from besa.data.questions import TASKS, questions
from besa.errors import BesaError
from besa.evaluation.zero_shot import DEFINITIONS, Questions, check_tasks, zero_shot
from besa.system import ranks
from tests import tiny_questions
from tests.pretend_ranks import each_rank
from tests.slowly import some_slow
from tests.tiny_questions import NOUNS, ask, rows, write

BY_PATH = {
    ("baber/piqa", None): "piqa", ("aps/super_glue", "boolq"): "boolq", ("Rowan/hellaswag", None): "hellaswag",
    ("allenai/winogrande", "winogrande_xl"): "winogrande", ("allenai/ai2_arc", "ARC-Easy"): "arc_easy",
    ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
}  # fmt: skip


def load_dataset(path, name=None, **_):
    """What the hub would give: the rows in the split that lm_eval takes, others elsewhere."""
    task = BY_PATH[path, name]
    mine, others = datasets.Dataset.from_list(rows(task)), datasets.Dataset.from_list(rows(task)[::-1])
    arc_splits = {"train": others, "validation": others, "test": mine}
    return arc_splits if task.startswith("arc") else {"train": others, "validation": mine, "test": others}


@pytest.fixture(autouse=True)
def embedded_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "fetch", lambda name, progress: write(name.removeprefix("zero-shot-"), tmp_path))


def from_the_hub(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_embedded_questions_are_scored_as_lm_eval_scores_the_same_rows(monkeypatch, tiny_llama, tiny_tokenizer):
    ours = ask(tiny_llama, tiny_tokenizer, TASKS)
    from_the_hub(monkeypatch)
    folder = Path(lm_eval.tasks.__file__).parent
    manager = TaskManager(
        include_path=[(folder / file).parent for file in DEFINITIONS.values()], include_defaults=False
    )
    scorer = HFLM(pretrained=tiny_llama, tokenizer=tiny_tokenizer, batch_size=16)
    theirs = evaluate(scorer, manager.load(list(TASKS)), log_samples=True)
    assert set(ours.tasks) == set(theirs["results"]) == set(TASKS)
    for task, accuracy in ours.tasks.items():
        result = theirs["results"][task]
        assert (accuracy.acc, accuracy.acc_stderr) == (result["acc,none"], result["acc_stderr,none"]), task
        assert accuracy.acc_norm == result.get("acc_norm,none"), task
        assert accuracy.acc_norm_stderr == result.get("acc_norm_stderr,none"), task
        assert accuracy.version == theirs["versions"][task]
        assert accuracy.questions == 6
        samples = sorted(theirs["samples"][task], key=lambda sample: sample["doc_id"])
        assert accuracy.right == "".join(str(int(sample["acc"])) for sample in samples)
        norm = [sample.get("acc_norm") for sample in samples]
        assert accuracy.right_norm == (None if None in norm else "".join(str(int(right)) for right in norm))
    assert len({accuracy.right for accuracy in ours.tasks.values()}) > 3
    assert ours.mean == pytest.approx(sum(result["acc,none"] for result in theirs["results"].values()) / 6)
    assert len({accuracy.acc for accuracy in ours.tasks.values()}) > 1


def test_questions_are_the_prompts_lm_eval_makes_of_its_own(monkeypatch, tiny_llama, tiny_tokenizer):
    asked = {"embedded": [], "hub": []}
    original = HFLM.loglikelihood
    for source, prompts in asked.items():
        with monkeypatch.context() as patch:
            patch.setattr(
                HFLM,
                "loglikelihood",
                lambda self, requests, prompts=prompts, **settings: (
                    prompts.extend(request.args for request in requests) or original(self, requests, **settings)
                ),
            )
            from_the_hub(patch)
            ask(tiny_llama, tiny_tokenizer, ["hellaswag", "arc_easy"], hub=source == "hub")
    assert asked["embedded"] == asked["hub"]
    assert len(asked["hub"]) == 2 * 6 * 4
    assert asked["hub"][0] == ("Building a house: A man looks at the river. He", " walks to the river.")


def test_a_digest_tells_questions_and_their_keys_apart(monkeypatch, tmp_path, tiny_llama, tiny_tokenizer):
    def digests(**settings):
        found = ask(tiny_llama, tiny_tokenizer, TASKS, **settings)
        return {task: accuracy.asked for task, accuracy in found.tasks.items()}

    def as_if(change):
        with monkeypatch.context() as patch:
            patch.setattr(tiny_questions, "rows", lambda task: change(rows(task)))
            return digests()

    first = digests()
    assert len({*first.values()}) == 6
    assert as_if(lambda asked: asked) == first
    for change in (lambda asked: asked[::-1], lambda asked: asked[:5], lambda asked: [other_key(asked[0]), *asked[1:]]):
        assert all(digest != first[task] for task, digest in as_if(change).items())
    with monkeypatch.context() as patch:
        from_the_hub(patch)
        assert digests(hub=True) == first
    assert digests(limit=5) == as_if(lambda asked: asked[:5])


def other_key(row):
    """The same question with another answer as the correct one."""
    if "choices" in row:
        labels = row["choices"]["label"]
        return row | {"answerKey": labels[(labels.index(row["answerKey"]) + 1) % 4]}
    if "answer" in row:
        return row | {"answer": "2" if row["answer"] == "1" else "1"}
    return row | {"label": str(1 - int(row["label"])) if isinstance(row["label"], str) else 1 - row["label"]}


def test_limit_progress_and_the_record(tiny_llama, tiny_tokenizer):
    told = []
    asked = Questions.of(tiny_tokenizer, ["piqa", "winogrande"])
    found = zero_shot(tiny_llama, asked, limit=3, batch=4, progress=lambda *news: told.append(news))
    assert [accuracy.questions for accuracy in found.tasks.values()] == [3, 3]
    assert told[-1] == (12, 12, "zero-shot")
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert (found.source, found.limit, found.lm_eval) == ("embedded", 3, "0.4.13")


def test_questions_that_lose_their_beginning_are_counted(monkeypatch, tiny_llama, tiny_tokenizer):
    """As many positions as the longest answer with its question needs, and fewer; alone, and on two ranks."""
    asked = []
    original = HFLM._loglikelihood_tokens

    def tokens(self, requests, **settings):
        asked.extend(len(question) + len(answer) - 1 for _, question, answer in requests)
        return original(self, requests, **settings)

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", tokens)
    whole = ask(tiny_llama, tiny_tokenizer, ["hellaswag", "piqa"])
    lengths = tuple(asked)
    assert whole.cut == 0
    for most in (max(lengths), max(lengths) - 1, min(lengths)):
        monkeypatch.setattr(tiny_llama.config, "max_position_embeddings", most)
        found = ask(tiny_llama, tiny_tokenizer, ["hellaswag", "piqa"])
        assert found.cut == sum(length > most for length in lengths)
        each = {task: ask(tiny_llama, tiny_tokenizer, [task]).cut for task in found.tasks}
        assert {task: accuracy.cut for task, accuracy in found.tasks.items()} == each
        assert each_rank(2, lambda: ask(tiny_llama, tiny_tokenizer, ["hellaswag", "piqa"])) == [found] * 2
    assert found.cut > 6
    answered = besa.evaluate(tiny_llama, tokenizer=tiny_tokenizer, tasks=["hellaswag", "piqa"])
    assert answered.notes == [
        f"{accuracy.cut} answers of {task} were scored without the beginning of their question, which is longer than "
        "the model takes."
        for task, accuracy in found.tasks.items()
    ]


@pytest.mark.parametrize("count", some_slow([2, 3, 20], {20}))
def test_ranks_share_whole_questions_and_find_the_same_accuracies(monkeypatch, tiny_llama, tiny_tokenizer, count):
    tasks, asked = ["hellaswag", "boolq", "arc_easy"], {}
    alone = ask(tiny_llama, tiny_tokenizer, tasks)
    original = HFLM.loglikelihood

    def loglikelihood(self, requests, **settings):
        asked[ranks.number()] = [(request.task_name, request.doc_id) for request in requests]
        assert (self.rank, self.world_size) == (0, 1)
        return original(self, requests, **settings)

    monkeypatch.setattr(HFLM, "loglikelihood", loglikelihood)
    monkeypatch.setenv("WORLD_SIZE", str(count))
    assert each_rank(count, lambda: ask(tiny_llama, tiny_tokenizer, tasks)) == [alone] * count
    assert set(asked) == set(range(min(count, 18)))
    assert sum(len(of_rank) for of_rank in asked.values()) == 6 * (4 + 2 + 4)
    assert sum(len(set(of_rank)) for of_rank in asked.values()) == 3 * 6  # no question is on two ranks


def test_an_error_on_one_rank_ends_all(monkeypatch, tiny_llama, tiny_tokenizer):
    forward = tiny_llama.forward

    def broken(**inputs):
        found = forward(**inputs)
        found.logits *= torch.inf if ranks.number() == 1 else 1
        return found

    monkeypatch.setattr(tiny_llama, "forward", broken)

    def measured():
        with pytest.raises(BesaError, match=r"^The model's output is NaN or infinite: .*\.$"):
            ask(tiny_llama, tiny_tokenizer, ["piqa"])

    assert each_rank(3, measured) == [None] * 3


def test_arc_questions_get_letters():
    first = questions("arc_easy")[0]
    assert first["choices"] == {"text": [f"the {noun}" for noun in NOUNS[:4]], "label": ["A", "B", "C", "D"]}
    assert (first["question"], first["answerKey"]) == ("What stands near the river?", "A")
    assert len(questions("arc_easy")) == 6


def test_what_cannot_be_asked_is_refused(monkeypatch, tiny_llama, tiny_tokenizer):
    def unreachable(**_):
        raise ConnectionError("no route\nto host")

    with pytest.raises(BesaError, match=r"^There is no task mmlu: choose from piqa, .*\.$"):
        check_tasks(["piqa", "mmlu"])
    with pytest.raises(BesaError, match=r"^The task piqa is named twice: .*\.$"):
        check_tasks(["piqa", "piqa"])
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(BesaError, match=r"^Could not read piqa .* \(no route\): leave --hub out .*\.$"):
        ask(tiny_llama, tiny_tokenizer, ["piqa"], hub=True)


def test_a_library_that_is_missing(monkeypatch):
    from besa.evaluation.zero_shot import _definitions

    _definitions.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(BesaError, match=r'^Zero-shot tasks need lm_eval: pip install "besa-llm\[eval\]"\.$'):
        check_tasks(["piqa"])


def test_output_that_is_not_finite_is_refused(tiny_llama, tiny_tokenizer, monkeypatch):
    head = tiny_llama.lm_head.weight
    monkeypatch.setattr(head, "data", torch.full_like(head, torch.inf))
    with pytest.raises(BesaError, match=r"^The model's output is NaN or infinite: .*\.$"):
        ask(tiny_llama, tiny_tokenizer, ["piqa"], limit=1)
