"""Zero-shot accuracy on the paper's six tasks, with the definitions, scoring and standard errors of lm_eval.

Besa adds only the source of the questions (embedded, or the Hugging Face Hub), the progress, and ranks that share the
questions. lm_eval itself sees one process: it forgoes its own setup for several if it is given a model, not its name.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa.data.documents import check_remote
from besa.data.questions import TASKS, questions
from besa.data.tokens import check_known
from besa.errors import BesaError
from besa.models.bos import adds_bos
from besa.models.limits import embedding_rows, positions
from besa.progress import Progress, silent
from besa.system import ranks

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

BATCH = 16  # sequences in a forward pass by default; a question with an answer is short
SPLIT = "evaluation"  # name of the split of embedded questions
# Files of lm_eval's task definitions, in its folder "tasks".
DEFINITIONS = {
    "piqa": "piqa/piqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
}


class Accuracy(BaseModel):
    """The share of a task's questions with a correct answer.

    Attributes:
        acc: share if the answer with the largest probability is chosen, as in Table 2 of the paper.
        acc_stderr: its standard error.
        acc_norm: share with probabilities per character; None if lm_eval's definition has no such score.
        acc_norm_stderr: its standard error.
        questions: number of questions.
        version: of lm_eval's definition.
        right: a 1 for each question with a correct answer and a 0 for each other one, in the order of the questions;
            None in files of before answers were kept.
        right_norm: the same with probabilities per character; None if there is no such score.
        asked: SHA-256 of what was asked: all questions with their answers, and which one is correct.
        cut: number of answers that were scored without the beginning of their question, which is longer than the model
            takes; None in files of before it was kept for each task.
    """

    acc: float
    acc_stderr: float | None
    acc_norm: float | None = None
    acc_norm_stderr: float | None = None
    questions: int
    version: float
    right: str | None = Field(default=None, pattern="^[01]+$")
    right_norm: str | None = Field(default=None, pattern="^[01]+$")
    asked: str | None = None
    cut: int | None = None


class ZeroShot(BaseModel):
    """Accuracies of one model.

    Attributes:
        tasks: by name.
        mean: of `acc` over the tasks.
        source: where the questions came from, ``embedded`` or ``hub``.
        limit: number of questions per task, at most; None for all.
        bos: whether each question began with the BOS token.
        lm_eval: its version.
        cut: number of answers of all tasks that were scored without the beginning of their question.
    """

    tasks: dict[str, Accuracy] = Field(min_length=1)
    mean: float
    source: str
    limit: int | None
    bos: bool = False
    lm_eval: str
    cut: int = 0

    @property
    def stderr(self) -> float:
        """Standard error of the mean; tasks without one count as exact."""
        return math.hypot(*(task.acc_stderr or 0.0 for task in self.tasks.values())) / len(self.tasks)


def check_tasks(tasks: Sequence[str]) -> None:
    """Check the tasks before any work.

    Raises:
        BesaError: a task is unknown or named twice, or lm_eval is not installed.
    """
    for task in tasks:
        if task not in TASKS:
            raise BesaError(
                f"There is no task {task}: choose from {', '.join(TASKS)}, or give lm_eval itself the checkpoint."
            )
        if tasks.count(task) > 1:
            raise BesaError(f"The task {task} is named twice: name it once.")
    if tasks:
        _definitions()


@dataclass(frozen=True)
class Questions:
    """The questions of some tasks, for models with one tokenizer.

    Attributes:
        tasks: lm_eval's, by name.
        tokenizer: of the models.
        source: where they came from, ``embedded`` or ``hub``.
        bos: whether they begin with the BOS token: ``yes``, ``no``, or ``auto`` as the tokenizer does by itself
            (lm_eval's default).
    """

    tasks: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    source: str
    bos: str

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[str],
        *,
        hub: bool = False,
        bos: str = "auto",
        progress: Progress = silent,
    ) -> Questions:
        """Read the questions of tasks, before any work.

        Args:
            tokenizer: of the model to ask.
            tasks: of `TASKS`.
            hub: use the questions of the Hugging Face Hub, as lm_eval does, instead of the embedded ones.
            bos: as of the class.
            progress: is called during a download.

        Raises:
            BesaError: as `check_tasks`; the questions cannot be read, or `bos` is ``yes`` but the tokenizer adds no BOS
                token.
        """
        check_tasks(tasks)
        if bos == "yes" and not adds_bos(tokenizer):
            raise BesaError(
                "--bos yes: the tokenizer puts no token before a text, so lm_eval cannot, and tasks need auto."
            )
        with _quiet():
            chosen = {task: _task(task, hub, progress) for task in tasks}
        return cls(chosen, tokenizer, "hub" if hub else "embedded", bos)


def zero_shot(
    model: PreTrainedModel,
    asked: Questions,
    *,
    limit: int | None = None,
    batch: int | None = None,
    progress: Progress = silent,
) -> ZeroShot:
    """Measure the accuracy of a model on zero-shot tasks. Ranks share the questions.

    Args:
        model: causal decoder; it runs on its own device.
        asked: the questions.
        limit: number of questions per task, from the beginning; None for all.
        batch: answers in a forward pass; the numbers depend on it, and on the number of ranks, only by rounding.
        progress: is called with (answers scored, answers, state).

    Raises:
        BesaError: the model does not know a token of the questions, or its output is not finite.
    """
    from lm_eval.evaluator import evaluate

    bos = {"auto": None, "yes": True, "no": False}[asked.bos]
    with _quiet():
        lm = _scorer(model, asked.tokenizer, batch or BATCH, bos, progress)
        results = evaluate(lm, task_dict={"tasks": asked.tasks, "groups": {}}, limit=limit, log_samples=False)
    accuracies = {name: _accuracy(results, name, task, lm.cut[name]) for name, task in asked.tasks.items()}
    return ZeroShot(
        tasks=accuracies,
        mean=sum(accuracy.acc for accuracy in accuracies.values()) / len(accuracies),
        source=asked.source,
        limit=limit,
        bos=asked.bos != "no" and adds_bos(asked.tokenizer),
        lm_eval=version("lm_eval"),
        cut=lm.cut.total(),
    )


def _accuracy(results: Any, task: str, answered: Any, cut: int) -> Accuracy:
    result = results["results"][task]
    scores = {name: result.get(f"{name},none") for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")}
    for name in ("acc_stderr", "acc_norm_stderr"):
        if isinstance(scores[name], str):  # "N/A" for a single question
            scores[name] = None
    number = results["n-samples"][task]["effective"]
    return Accuracy(
        **scores,
        questions=number,
        version=float(results["versions"][task]),
        right=answered.right["acc"],
        right_norm=answered.right.get("acc_norm"),
        asked=_asked(answered),
        cut=cut,
    )


def _asked(task: ConfigurableTask) -> str:
    """A digest of the questions, their answers and the correct ones."""
    digest = hashlib.sha256()
    for _, requests in groupby(task.instances, lambda one: one.doc_id):
        scored = list(requests)
        question = scored[0].doc
        # Of Winogrande, the correct answer stands in what the others have as the question.
        correct = [str(task.doc_to_text(question)), str(task.doc_to_target(question))]
        digest.update(json.dumps([*(request.args for request in scored), correct]).encode() + b"\n")
    return digest.hexdigest()


@cache
def _definitions() -> Path:
    """The folder of lm_eval's definitions.

    Raises:
        BesaError: it is not installed.
    """
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise BesaError('Zero-shot tasks need lm_eval: pip install "besa-llm[eval]".') from error
    return Path(lm_eval.tasks.__file__).parent


def _task(name: str, hub: bool, progress: Progress) -> ConfigurableTask:
    """lm_eval's task, with the embedded questions unless `hub` is set."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    class Task(ConfigurableTask):  # type: ignore[misc]  # lm_eval has no types
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config=config)
            self.right: dict[str, str] = {}

        def process_results(self, doc: Any, results: Any) -> dict[str, float]:
            """Called for one question after the other, in their order."""
            scores: dict[str, float] = super().process_results(doc, results)
            for score, value in scores.items():
                self.right[score] = self.right.get(score, "") + ("1" if value else "0")
            return scores

        def build_all_requests(self, **settings: Any) -> None:
            with redirect_stderr(io.StringIO()):  # no setting turns off its progress bar
                super().build_all_requests(**settings)

    config = load_yaml(_definitions() / DEFINITIONS[name]) | {"num_fewshot": 0}
    config.pop("tag", None)
    if not hub:
        import datasets

        rows = datasets.Dataset.from_list(questions(name, progress))
        config |= {"custom_dataset": lambda **_: {SPLIT: rows}, "training_split": None}
        config |= {"validation_split": SPLIT, "test_split": None}
        return Task(config=config)
    check_remote(name, config["dataset_path"])
    try:
        return Task(config=config)
    except Exception as error:  # the library passes on all exceptions of its HTTP, file and parser layers
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        raise BesaError(
            f"Could not read {name} from the Hugging Face Hub ({reason}): leave --hub out for the embedded questions."
        ) from error


def _scorer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int, bos: bool | None, progress: Progress
) -> Any:
    """lm_eval's scorer of answers, with progress and checks."""
    from lm_eval.models.huggingface import HFLM

    class Scorer(HFLM):  # type: ignore[misc]  # lm_eval has no types
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.cut: Counter[str] = Counter()  # answers by task, of all ranks

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """Ranks share the questions. Every rank gets the scores of all, as if it had asked them by itself."""
            questions = [list(answers) for _, answers in groupby(requests, lambda one: (one.task_name, one.doc_id))]
            own = [request for question in questions[ranks.number() :: ranks.count()] for request in question]
            problem, scores = "", []
            self.own_cut: Counter[str] = Counter()
            try:
                scores = self._scored(own, len(requests))
            except BesaError as error:  # all ranks end alike
                problem = str(error)
            of_ranks: list[list[Any]] = ranks.all_of([problem, scores, self.own_cut])
            for problem, *_ in of_ranks:
                if problem:
                    raise BesaError(problem)
            for *_, cut in of_ranks:
                self.cut.update(cut)
            progress(len(requests), len(requests), "zero-shot")
            left = [iter(of_rank) for _, of_rank, _ in of_ranks]
            return [
                (score, greedy)
                for place, question in enumerate(questions)
                for score, greedy in islice(left[place % len(left)], len(question))
            ]

        def _scored(self, requests: list[Any], total: int) -> list[tuple[float, bool]]:
            """The scores of this rank's requests, of `total` of all ranks."""
            if not requests:
                return []
            self.done, self.answers, self.share = 0, total, len(requests) / total
            self.task_names = [request.task_name for request in requests]
            self.finite: list[Tensor] = []  # of each batch; read at the end, because reading waits for an accelerator
            scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            if not bool(torch.stack(self.finite).all()):
                raise BesaError("The model's output is NaN or infinite: try --dtype float32, or check the checkpoint.")
            return scores

        def _loglikelihood_tokens(self, requests: list[Any], **settings: Any) -> list[tuple[float, bool]]:
            for task, (_, question, answer) in zip(self.task_names, requests, strict=True):
                check_known(torch.tensor([*question, *answer]), embedding_rows(model), tokenizer)
                if len(answer) > self.max_length:
                    raise BesaError(f"An answer has {len(answer)} tokens, and the model {self.max_length} positions.")
                # The last token is only predicted.
                self.own_cut[task] += len(question) + len(answer) > self.max_length + 1
            scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, **settings)
            return scores

        @torch.no_grad()
        def _model_call(self, inps: Tensor, attn_mask: None = None, labels: None = None) -> Tensor:
            logits: Tensor = self.model(input_ids=inps, use_cache=False).logits
            self.finite.append(logits.isfinite().all())
            self.done += len(inps)  # may end below the total: answers of one token to a question are scored together
            progress(self.done / self.share, self.answers, "zero-shot")
            return logits

    longest = positions(model).most  # longer questions lose their beginning
    return Scorer(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=longest, add_bos_token=bos)


@contextmanager
def _quiet() -> Iterator[None]:
    """While open, lm_eval and the datasets library print no log and no progress bars."""
    import datasets

    logger, bars = logging.getLogger("lm_eval"), datasets.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
