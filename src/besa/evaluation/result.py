"""What an evaluation found; the JSON that `besa eval` writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, computed_field

from besa.evaluation.domains import mean_of_domains
from besa.evaluation.perplexity import Infinite, Perplexity
from besa.evaluation.zero_shot import ZeroShot
from besa.models.source import same_files
from besa.record import RunRecord, read_result

EVALUATION_NAME = "besa_eval.json"


class Evaluation(BaseModel):
    """What `evaluate` measured (in JSON, an infinite perplexity is the string ``"Infinity"``).

    Attributes:
        model: what was evaluated.
        revision: its commit, if it came from the Hugging Face Hub.
        fingerprint: digest of the model's files; None for a model in memory, and in files of before.
        dtype: that the model computed in; None in files of before.
        perplexity: by name of the text.
        window: tokens of a window; perplexities of different windows do not compare.
        details: windows, predicted tokens and bits per byte by name of the text.
        other_windows: the same for windows of other lengths, by their tokens.
        sources: where each text came from, by its name: ``hub``, a file's name, or as it was given.
        beginnings: of each text, by its name: whether it was read as it is meant.
        max_windows: of each text and length, from the beginning; None for all, and in files of before.
        notes: what a user should know, a sentence each.
        bos: what was asked for: ``auto``, ``yes`` or ``no``; what came of it stands in the details and with the tasks.
        zero_shot: accuracies, where tasks were asked for.
        sparsity: share of zeros as the checkpoint declares it, or else as counted; None for a dense model.
        pruned: when the model was pruned, as its record says; None if there is no record, and in files of before.
        seconds: evaluation time.
        created: when.
        versions: of besa and of what the numbers depend on.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    model: str = ""
    revision: str | None = None
    fingerprint: str | None = None
    dtype: str | None = None
    perplexity: dict[str, Infinite]
    window: int
    details: dict[str, Perplexity] = {}
    other_windows: dict[int, dict[str, Perplexity]] = {}
    sources: dict[str, str] = {}
    beginnings: dict[str, str] = {}
    max_windows: int | None = None
    notes: list[str] = []
    bos: str = "auto"
    zero_shot: ZeroShot | None = None
    sparsity: float | None = None
    pruned: str | None = None
    seconds: float | None = None
    created: str = ""
    versions: dict[str, str] = {}

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorated property
    @property
    def domains(self) -> float | None:
        """The geometric mean over the domains in windows of the first length, if all were measured."""
        return mean_of_domains(self.perplexity)

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Read what `besa eval` wrote, also with less in it than this besa writes.

        Raises:
            BesaError: the file cannot be read, or is no evaluation.
        """
        return read_result(path, cls, "evaluation", "eval")

    def may_be_of(self, folder: Path) -> bool:
        """Whether the checkpoint in a folder was measured, as far as anybody knows: by its run, and by its files.

        Raises:
            BesaError: the folder has a record that is damaged.
        """
        record = RunRecord.of(folder)
        if record is not None:
            of_run = self.pruned == record.created if self.pruned else self.sparsity == record.sparsity
            if not of_run:
                return False
        return same_files(self.fingerprint, folder)

    @classmethod
    def joined(cls, parts: Sequence[Evaluation]) -> Evaluation:
        """One evaluation of parts as `of` makes them: they are of one model in windows of one length."""

        def together(by_text: Iterable[dict[str, Any]]) -> dict[str, Any]:
            return {name: value for one in by_text for name, value in one.items()}

        lengths = dict.fromkeys(length for part in parts for length in part.other_windows)
        update = {
            "perplexity": together(part.perplexity for part in parts),
            "details": together(part.details for part in parts),
            "other_windows": {n: together(part.other_windows.get(n, {}) for part in parts) for n in lengths},
            "sources": together(part.sources for part in parts),
            "beginnings": together(part.beginnings for part in parts),
            "notes": list(dict.fromkeys(note for part in parts for note in part.notes)),
            "zero_shot": next((part.zero_shot for part in parts if part.zero_shot), None),
        }
        return parts[0].model_copy(update=update)

    def of(self, text: str | None) -> Evaluation:
        """The part of one text, or for None of the tasks."""

        def only(by_text: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in by_text.items() if name == text}

        return self.model_copy(
            update={
                "perplexity": only(self.perplexity),
                "details": only(self.details),
                "other_windows": {length: only(by_text) for length, by_text in self.other_windows.items()},
                "sources": only(self.sources),
                "beginnings": only(self.beginnings),
                "zero_shot": self.zero_shot if text is None else None,
            }
        )
