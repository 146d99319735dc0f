"""A folder of runs and evaluations under the keys of what decides them: what is there is not done again."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from besa.api import compress, evaluate
from besa.checkpoint.files import write_file
from besa.evaluation.result import Evaluation
from besa.models.loading import fingerprint, locate
from besa.progress import Progress, labelled, silent
from besa.recipe import Recipe
from besa.record import RECORD_NAME, RunRecord

DENSE = "dense"


@dataclass(frozen=True)
class Conditions:
    """What pruning runs have in common; fields as the arguments of `compress`."""

    model: str
    calibration: str = "c4"
    samples: int = 128
    seqlen: int = 2048
    device: str = "cpu"
    dtype: str = "auto"
    batch: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Measures:
    """What models are measured by; fields as the arguments of `evaluate`."""

    texts: tuple[str, ...] = ()
    data: dict[str, str] = field(default_factory=dict)
    window: int = 2048
    max_windows: int | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    hub: bool = False


@dataclass(frozen=True)
class Outcome:
    """A run and how good its model is; the dense model has no record."""

    record: RunRecord | None
    evaluation: Evaluation

    @property
    def scores(self) -> dict[str, float]:
        """Perplexity by text, accuracy in per cent by task, and `accuracy`, their mean."""
        scores = dict(self.evaluation.perplexity)
        if (asked := self.evaluation.zero_shot) is not None:
            scores |= {task: 100 * found.acc for task, found in asked.tasks.items()} | {"accuracy": 100 * asked.mean}
        return scores


@dataclass(frozen=True)
class Workspace:
    """Where runs and evaluations are kept, as `KEY.run.json` and `KEY.EVALUATION.json`.

    Attributes:
        folder: is made when needed.
        conditions: of the runs.
        measures: of the evaluations.
        keep: leave pruned weights in `KEY/`; else they go once they are evaluated, and another evaluation prunes anew.
        progress: told about each piece of work in turn.
    """

    folder: Path
    conditions: Conditions
    measures: Measures
    keep: bool = False
    progress: Progress = silent

    def outcome(self, recipe: Recipe | None, seed: int = 0) -> Outcome:
        """The run of a recipe (None: the dense model) and its evaluation; done now, or gone on with, where missing.

        Raises:
            BesaError: as `compress` and `evaluate`.
        """
        key = DENSE if recipe is None else self._key(recipe, seed)
        path = self.folder / f"{key}.{self._evaluation_key()}.json"
        record = self.folder / f"{key}.run.json"
        if not path.exists() or (recipe is not None and not record.exists()):
            self._work(recipe, seed, self.folder / key, record, path)
        return Outcome(
            RunRecord.read(record) if recipe is not None else None,
            Evaluation.model_validate_json(path.read_text(encoding="utf-8")),
        )

    def _work(self, recipe: Recipe | None, seed: int, checkpoint: Path, record: Path, evaluation: Path) -> None:
        told = labelled(self.progress, checkpoint.name.rpartition("-")[0] or DENSE)
        if recipe is not None and not checkpoint.exists():
            settings = asdict(self.conditions)
            compress(settings.pop("model"), recipe, out=checkpoint, seed=seed, resume=True, progress=told, **settings)
        if recipe is not None:
            write_file(record, (checkpoint / RECORD_NAME).read_text(encoding="utf-8"))
        found = evaluate(
            checkpoint if recipe is not None else self.conditions.model,
            batch=self.conditions.batch,
            device=self.conditions.device,
            dtype=self.conditions.dtype,
            trust_remote_code=self.conditions.trust_remote_code,
            progress=told,
            **asdict(self.measures),
        )
        write_file(evaluation, found.model_dump_json(indent=2) + "\n")
        if recipe is not None and not self.keep:
            shutil.rmtree(checkpoint)

    def _key(self, recipe: Recipe, seed: int) -> str:
        """A name that a reader knows the run by, and a digest of all that decides its result."""
        settings = recipe.model_dump(mode="json")
        name = settings.pop("name")
        decisive = asdict(self.conditions) | {
            "recipe": settings,
            "model": self._model(),
            "calibration": _content(self.conditions.calibration),
        }
        return f"{name}-{recipe.sparsity:g}-seed{seed}-{_digest(decisive | {'seed': seed})}"

    def _evaluation_key(self) -> str:
        """Of what the numbers depend on besides the pruned model; of the dense model, on that too."""
        measures = asdict(self.measures) | {
            "texts": [_content(text) for text in self.measures.texts],
            "data": {name: _content(file) for name, file in self.measures.data.items()},
        }
        return _digest(measures | {"model": self._model(), "dtype": self.conditions.dtype})

    def _model(self) -> str:
        """The model's name, or of local files a digest."""
        return fingerprint(locate(self.conditions.model, self.progress)) or self.conditions.model


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def _content(text: str) -> str:
    """The name of a text, or of a local file a digest of what is in it."""
    path = Path(text)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else text
