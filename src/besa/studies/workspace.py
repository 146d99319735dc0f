"""A folder of runs and evaluations. The key of each holds all that decides its result, so that nothing is done twice.

Weights that stay have their evaluation beside them, as `besa eval` writes it.

Weights that are to be removed after their evaluation have a file `KEY.passing` beside them. If a command is stopped
before that, they are removed when it is resumed.

Versions and machine are part of every key: results of another besa or another machine are not used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from besa.api import compress, evaluate
from besa.data.calibration import sample
from besa.data.documents import check_there
from besa.data.domains import DOMAINS
from besa.data.embedded import EMBEDDED
from besa.data.mixture import MIX, OWN, parts_of, texts_of
from besa.data.questions import ACCURACY
from besa.digests import sha256_of
from besa.errors import BesaError, Interrupted
from besa.evaluation.adding import added
from besa.evaluation.carding import tell_card
from besa.evaluation.domains import ALL, mean_of_domains
from besa.evaluation.result import EVALUATION_NAME, Evaluation
from besa.evaluation.texts import TEST_SETS, check_texts, read_texts, text_name
from besa.evaluation.zero_shot import check_tasks
from besa.methods.recipe import Recipe
from besa.models.bos import bos_token
from besa.models.finding import find_blocks
from besa.models.loading import load_tokenizer, read_config, skeleton
from besa.models.source import Source, check_apart, fingerprint, locate
from besa.planning import check_suits
from besa.progress import Progress, labelled, silent
from besa.record import RECORD_NAME, RunRecord
from besa.runtime.chat_template import dialogue_of
from besa.storage.names import path_of, plain
from besa.storage.writing import write_file
from besa.studies.leftovers import PASSING
from besa.studies.origin import Origin
from besa.system.devices import resolve_device

DENSE = "dense"
NAMED = {*EMBEDDED, MIX, OWN, *TEST_SETS, *DOMAINS, ALL}  # texts that a file of the same name does not stand for
Result = TypeVar("Result", RunRecord, Evaluation)


@dataclass(frozen=True)
class Conditions:
    """What pruning runs have in common; fields as the arguments of `compress`, with a device that is resolved."""

    model: str
    calibration: str = MIX
    samples: int = 128
    seqlen: int = 2048
    device: str = "cpu"
    dtype: str = "auto"
    batch: int | None = None
    bos: str = "auto"
    trust_remote_code: bool = False
    chat: bool = False


@dataclass(frozen=True)
class Measures:
    """How models are evaluated; fields as the arguments of `evaluate`."""

    texts: tuple[str, ...] = ()
    data: dict[str, str] = field(default_factory=dict, hash=False)
    window: int = 2048
    max_windows: int | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    hub: bool = False

    def only(self, texts: Iterable[str], tasks: tuple[str, ...] = ()) -> Measures:
        """A copy with some of the texts only, and with these tasks."""
        texts = tuple(texts)
        data = {name: file for name, file in self.data.items() if name in texts}
        return replace(self, texts=texts, data=data, tasks=tasks)

    @property
    def arguments(self) -> dict[str, Any]:
        """As arguments of `evaluate`, which refuses those that nothing is measured by."""
        unused = (() if self.texts else ("window", "max_windows")) + (() if self.tasks else ("limit", "hub"))
        return {name: value for name, value in asdict(self).items() if name not in unused}

    def each(self) -> list[Measures]:
        """One text each, and all tasks together; results are kept apart, so that other sets of texts find them."""
        return [*(self.only([text]) for text in self.texts), *([self.only([], self.tasks)] if self.tasks else [])]


@dataclass(frozen=True)
class Outcome:
    """A run and the evaluations of its model.

    Attributes:
        record: of the run; the dense model has none.
        evaluations: one for each text, and one for all tasks.
        origin: versions and machine that made them; None where it is not known.
    """

    record: RunRecord | None
    evaluations: list[Evaluation]
    origin: Origin | None = None

    @property
    def scores(self) -> dict[str, float]:
        """Perplexity by text and mean of the domains; accuracy in per cent by task, and `accuracy`, their mean."""
        scores: dict[str, float] = {}
        for evaluation in self.evaluations:
            scores |= evaluation.perplexity
        if (mean := mean_of_domains(scores)) is not None:
            scores[ALL] = mean
        for evaluation in self.evaluations:
            if (asked := evaluation.zero_shot) is not None:
                scores |= {task: 100 * accuracy.acc for task, accuracy in asked.tasks.items()}
                scores[ACCURACY] = 100 * asked.mean
        return scores

    @property
    def sparsity(self) -> float:
        """Counted in the written tensors; of the model that runs begin with, what its evaluation found."""
        if self.record is not None:
            return self.record.sparsity
        return next((evaluation.sparsity for evaluation in self.evaluations if evaluation.sparsity), 0.0)

    @property
    def notes(self) -> list[str]:
        """What a reader should know, a sentence each: of the run, then of the evaluations, if there are any."""
        of_run = self.record.notes if self.record is not None else []
        return [*of_run, *(note for evaluation in self.evaluations for note in evaluation.notes)]

    @property
    def evaluation(self) -> Evaluation:
        """All evaluations as one."""
        return Evaluation.joined(self.evaluations)


@dataclass(frozen=True)
class Workspace:
    """Where runs and evaluations are kept, as `KEY.run.json` and `KEY.EVALUATION.json`.

    Attributes:
        folder: created when it is needed.
        conditions: of the runs.
        measures: of the evaluations.
        keep: keep pruned weights in `KEY/`; else they are removed after their evaluation, and another evaluation prunes
            again.
        progress: told about each piece of work in turn.
        device: where this rank computes; None for the device of the conditions, which is the same for all ranks.
    """

    folder: Path
    conditions: Conditions
    measures: Measures
    keep: bool = False
    progress: Progress = silent
    device: str | None = None

    @cached_property
    def origin(self) -> Origin:
        """Versions and machine of what is made now."""
        return Origin.here(self._device)

    @property
    def _device(self) -> str:
        return self.device or self.conditions.device

    def outcome(self, recipe: Recipe | None, seed: int = 0) -> Outcome:
        """The run of a recipe (None: the dense model) and its evaluations; what is missing is done or resumed now.

        Raises:
            BesaError: as `compress` and `evaluate`.
            Interrupted: Ctrl-C, after something was finished.
        """
        key, files = self._files(recipe, seed)
        record, checkpoint = self.folder / f"{key}.run.json", self.folder / key
        passing = self.folder / f"{key}{PASSING}"  # beside weights that go once they are evaluated
        if self.keep:
            passing.unlink(missing_ok=True)
        kept = self.keep or (checkpoint.exists() and not passing.exists())
        missing = self._missing(key, files)
        try:
            if recipe is not None and (missing or not self._pruned(key)):
                if not kept:
                    write_file(passing, "")
                self._prune(recipe, seed, checkpoint, record)
                missing = self._missing(key, files)
            if missing:
                self._measure(checkpoint if recipe is not None else self._source.pinned, missing)
        except (KeyboardInterrupt, Interrupted) as stopped:
            if isinstance(stopped, KeyboardInterrupt) and not any(self.folder.glob("*.json")):
                raise
            kept_in = f"what was finished is kept in {self.folder}"
            raise Interrupted(f"interrupted; {kept_in}: the same command goes on.") from None
        if not kept and checkpoint.exists():
            shutil.rmtree(checkpoint)
            passing.unlink(missing_ok=True)
        found = Outcome(
            _read(RunRecord, record) if recipe is not None else None,
            [_read(Evaluation, path) for path in files.values()],
            self.origin,
        )
        beside = checkpoint / EVALUATION_NAME
        if found.record is not None and checkpoint.exists() and files and (missing or not beside.exists()):
            write_file(beside, added(found.evaluation, beside).model_dump_json(indent=2) + "\n")
            tell_card(beside, str(checkpoint))
        return found

    def done(self, recipe: Recipe | None, seed: int = 0) -> bool:
        """Whether `outcome` would find all that it needs."""
        key, files = self._files(recipe, seed)
        return not self._missing(key, files) and (recipe is None or self._pruned(key))

    def _missing(self, key: str, files: Mapping[Measures, Path]) -> dict[Measures, Path]:
        """Evaluations that are not there, or are of an earlier run than the weights that are.

        Raises:
            BesaError: a file is damaged.
        """
        checkpoint = self.folder / key
        return {
            measures: path
            for measures, path in files.items()
            if not path.exists() or (checkpoint.exists() and not _read(Evaluation, path).may_be_of(checkpoint))
        }

    def _pruned(self, key: str) -> bool:
        """Whether the record of a run is there, and its weights if they are to be kept."""
        return (self.folder / f"{key}.run.json").exists() and ((self.folder / key).exists() or not self.keep)

    def check(self, runs: Iterable[tuple[Recipe | None, int]]) -> None:
        """Check, before the work, what the missing runs (recipes and seeds) need.

        Raises:
            BesaError: a text, a task, the model or the device cannot be had, a text is too short, a recipe cannot be
                used on the model, or the folder lies in the model's.
        """
        runs = list(runs)
        check_apart(self.conditions.model, self.folder)
        check_texts(self.measures.texts, self.measures.data)
        for text in texts_of(self.conditions.calibration):
            check_there(text)
        if all(self.done(*run) for run in runs):
            return
        given, device = self.conditions, resolve_device(self._device)
        check_tasks(self.measures.tasks)
        read_texts(self.measures.texts, self.measures.data, self.progress)
        tokenizer, config = load_tokenizer(self._source), read_config(self._source)
        first = bos_token(given.bos, tokenizer, config)
        config.dtype = getattr(torch, given.dtype) if given.dtype != "auto" else config.dtype or torch.float32
        empty = skeleton(self._source, config)
        for recipe in {id(recipe): recipe for recipe, _ in runs if recipe is not None}.values():
            check_suits(empty, find_blocks(empty), recipe, given.seqlen, device, as_codes=True)
        sample(
            given.calibration,
            tokenizer,
            given.samples,
            given.seqlen,
            0,
            self.progress,
            bos=first,
            dialogue=dialogue_of(tokenizer) if given.chat else None,
            author=lambda size: torch.zeros(size, given.seqlen, dtype=torch.int64),  # the model writes when it runs
        )

    def checkpoint(self, recipe: Recipe, seed: int = 0) -> Path:
        """Where the pruned weights of a run are, if they are kept."""
        return self.folder / self.key(recipe, seed)

    def _files(self, recipe: Recipe | None, seed: int) -> tuple[str, dict[Measures, Path]]:
        """The key of a run, and where its evaluations are."""
        key = self.key(recipe, seed)
        return key, {each: self.folder / f"{key}.{self._name(each)}.json" for each in self.measures.each()}

    def _prune(self, recipe: Recipe, seed: int, checkpoint: Path, record: Path) -> None:
        if not checkpoint.exists():
            progress, settings = labelled(self.progress, _label(checkpoint)), asdict(self.conditions)
            settings |= {"model": self._source.pinned, "device": self._device}
            compress(recipe=recipe, out=checkpoint, seed=seed, resume=True, progress=progress, **settings)
        write_file(record, (checkpoint / RECORD_NAME).read_text(encoding="utf-8"))

    def _measure(self, model: str | Path, missing: Mapping[Measures, Path]) -> None:
        """Evaluate in one go, and keep the results of each text and of the tasks apart."""
        texts = [text for measures in missing for text in measures.texts]
        tasks = next((measures.tasks for measures in missing if measures.tasks), ())
        evaluation = evaluate(
            model,
            batch=self.conditions.batch,
            device=self._device,
            dtype=self.conditions.dtype,
            bos=self.conditions.bos,
            trust_remote_code=self.conditions.trust_remote_code,
            progress=labelled(self.progress, _label(model) if isinstance(model, Path) else DENSE),
            **self.measures.only(texts, tasks).arguments,
        )
        for measures, path in missing.items():
            part = evaluation.of(text_name(measures.texts[0]) if measures.texts else None)
            write_file(path, part.model_dump_json(indent=2) + "\n")

    def decisive(self) -> dict[str, Any]:
        """Everything that decides results besides recipe and seed, in JSON types; files by their content."""
        decisive: dict[str, Any] = json.loads(json.dumps(self._of_runs() | self._of_evaluation(self.measures)))
        return decisive

    def key(self, recipe: Recipe | None, seed: int) -> str:
        """Key of a run: a readable name, and a digest of all that decides its result."""
        if recipe is None:
            return DENSE
        settings = recipe.model_dump(mode="json")
        name = settings.pop("name")
        decisive = self._of_runs() | {"recipe": settings, "seed": seed}
        return f"{name}-{recipe.sparsity:g}-seed{seed}-{self._digest(decisive)}"

    def _name(self, measures: Measures) -> str:
        """Key of an evaluation: a readable name, and a digest of what decides it besides the pruned model."""
        name = text_name(measures.texts[0]) if measures.texts else "zero-shot"
        return f"{plain(name)}-{self._digest(self._of_evaluation(measures))}"

    def _digest(self, decisive: dict[str, Any]) -> str:
        content = decisive | {"origin": self.origin.model_dump()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]

    def _of_runs(self) -> dict[str, Any]:
        decisive = asdict(self.conditions) | {
            "model": self._fingerprint,
            "calibration": _calibrated_on(self.conditions.calibration),
        }
        if not self.conditions.chat:
            del decisive["chat"]  # plain text, as before there was a choice
        return decisive

    def _of_evaluation(self, measures: Measures) -> dict[str, Any]:
        """What an evaluation depends on besides the pruned model; the dense model and its dtype are part of it."""
        return asdict(measures) | {
            "texts": [_content(text) for text in measures.texts],
            "data": {name: _digest(file) for name, file in measures.data.items()},
            "model": self._fingerprint,
            "dtype": self.conditions.dtype,
            "bos": self.conditions.bos,
        }

    @cached_property
    def _source(self) -> Source:
        """The model, at one commit for all runs."""
        given = self.conditions
        return locate(given.model, self.progress, trust_remote_code=given.trust_remote_code).local(self.progress)

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._source)


def _read(kind: type[Result], path: Path) -> Result:
    """What a file of a workspace holds.

    Raises:
        BesaError: it is damaged.
    """
    try:
        return kind.read(path)
    except BesaError as error:
        raise BesaError(f"{path} is damaged: remove it, and the same command makes it again.") from error


def _label(checkpoint: Path) -> str:
    """The key without its digest."""
    return checkpoint.name.rpartition("-")[0]


def _calibrated_on(calibration: str) -> Any:
    """Digest of a calibration text, or of the texts of a mixture with their shares."""
    parts = parts_of(calibration)
    if len(parts) == 1:
        return _content(parts[0].source)
    return [[_content(part.source), str(part.share)] for part in parts]


def _content(text: str) -> str:
    """The name of a text that has one, or of a local file a digest of what is in it."""
    return text if text in NAMED else _digest(text)


def _digest(text: str) -> str:
    """Of what is in a local file; the name of a data set of the Hub."""
    path = path_of(text)
    return sha256_of(path) if path.is_file() else text
