"""What an evaluation found; the JSON that `besa eval` writes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from besa.evaluation.perplexity import Perplexity
from besa.evaluation.zero_shot import ZeroShot


class Evaluation(BaseModel):
    """What `evaluate` measured (in JSON, an infinite perplexity is ``Infinity``).

    Attributes:
        model: what was evaluated.
        perplexity: by name of the text.
        window: tokens of a window; perplexities of different windows do not compare.
        details: windows, predicted tokens and bits per byte by name of the text.
        other_windows: the same for windows of other lengths, by their tokens.
        sources: where each text came from, by its name: ``hub``, a file's name, or as it was given.
        beginnings: of each text, by its name: whether it was read as it is meant.
        notes: what a user should know, a sentence each.
        bos: what was asked for: ``auto``, ``yes`` or ``no``; what came of it stands in the details and with the tasks.
        zero_shot: accuracies, where tasks were asked for.
        sparsity: share of zeros as the checkpoint declares it, None for a model besa did not prune.
        seconds: evaluation time.
        created: when.
        versions: of besa and of what the numbers depend on.
    """

    model_config = ConfigDict(ser_json_inf_nan="constants")

    model: str
    perplexity: dict[str, float]
    window: int
    details: dict[str, Perplexity]
    other_windows: dict[int, dict[str, Perplexity]] = {}
    sources: dict[str, str] = {}
    beginnings: dict[str, str] = {}
    notes: list[str] = []
    bos: str = "auto"
    zero_shot: ZeroShot | None = None
    sparsity: float | None
    seconds: float
    created: str
    versions: dict[str, str]

    def of(self, text: str | None) -> Evaluation:
        """The part of one text, or for None of the tasks."""

        def only(found: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in found.items() if name == text}

        return self.model_copy(
            update={
                "perplexity": only(self.perplexity),
                "details": only(self.details),
                "other_windows": {length: only(found) for length, found in self.other_windows.items()},
                "sources": only(self.sources),
                "beginnings": only(self.beginnings),
                "zero_shot": self.zero_shot if text is None else None,
            }
        )
