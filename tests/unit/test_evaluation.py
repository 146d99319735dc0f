"""What an evaluation found: written, read, taken apart and joined."""

import json
import math
from pathlib import Path

import pytest

from besa.errors import BesaError
from besa.evaluation.perplexity import Perplexity
from besa.evaluation.result import Evaluation
from besa.evaluation.zero_shot import Accuracy, ZeroShot


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


def test_infinite_perplexities_are_read_as_they_were_written(tmp_path: Path) -> None:
    path, hopeless = tmp_path / "besa_eval.json", evaluation(math.inf)
    path.write_text(hopeless.model_dump_json())
    assert Evaluation.read(path) == hopeless
    path.write_text(json.dumps(json.loads(path.read_text())).replace("Infinity", "null"))  # as earlier files have them
    assert Evaluation.read(path) == hopeless


def test_what_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "besa_eval.json"
    with pytest.raises(BesaError, match="cannot be read"):
        Evaluation.read(path)
    path.write_text("{}")
    with pytest.raises(BesaError, match="is not a besa evaluation: write it anew"):
        Evaluation.read(path)
