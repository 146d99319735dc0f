"""The model card of a checkpoint: the README.md that the Hugging Face Hub shows and reads.

A card is made from the record and the configuration beside it, and so is the same whenever it is made. Later only the
part between two marks and besa's own results in the metadata are made anew: whatever else a user wrote stays.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData, RepoCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index

from besa.checkpoint.card_text import BEGIN, END, NOWHERE, About, Origin
from besa.checkpoint.measurements import NOTHING, Measurement, Measurements
from besa.errors import Notice
from besa.models.hub import CARD
from besa.storage.writing import write_file

MARKED = re.compile(f"^{re.escape(BEGIN)}$.*?^{re.escape(END)}$", re.DOTALL | re.MULTILINE)
RESULTS = "model-index"  # the key of the metadata under which the Hub looks for results
MEASURED_BY = "measured_by"  # argument of besa's own results there
LARGEST = 1 << 20  # bytes of a card that is read
LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
LANGUAGE = re.compile(r"[A-Za-z]{2,16}(-[A-Za-z0-9]{1,16})*")
LINK = re.compile(r"(https?://[^\s<>\"]{1,500}|[A-Za-z0-9_][A-Za-z0-9_./-]{0,200})")
TASK = "text-generation"


def write_card(folder: Path, base: Path | None, origin: Origin = NOWHERE) -> None:
    """Write the card of a new checkpoint, which nobody has measured yet.

    The licence and the languages are those in the card of the model that the checkpoint was made from. If that card is
    damaged, nothing is taken from it, and a notice says so.

    Args:
        folder: of the checkpoint, with everything else in it.
        base: folder of the model that it was made from; None if there is none.
        origin: of that model, for a checkpoint without a record that says so.

    Raises:
        BesaError: the card cannot be written.
    """
    about = About.of(folder, origin)
    terms = _terms(base) or about.known_terms
    data = ModelCardData(
        base_model=about.base,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=about.tags,
        base_model_relation="quantized" if about.base and about.coded else None,
        **terms,
    )
    part = about.part(NOTHING, None, "license" in terms)
    write_file(folder / CARD, f"---\n{data.to_yaml()}\n---\n\n{part}\n")


def refresh_card(folder: Path, measurements: Measurements, name: str | None = None) -> None:
    """Bring the card of a checkpoint up to date; a checkpoint without one gets one.

    In a card that has lost besa's marks, only the results in the metadata change. A card that cannot be read stays as
    it is, and a notice says so.

    Args:
        folder: of the checkpoint.
        measurements: all that is known of it.
        name: of its repository on the Hub, for the commands in the text; None if it has none.

    Raises:
        BesaError: the card cannot be written.
    """
    if not (folder / CARD).exists():
        write_card(folder, None)
    try:
        text = _read(folder / CARD)
        card = RepoCard(text if REGEX_YAML_BLOCK.search(text) else f"---\n\n---\n{text}")
        results = _results(card.data.get(RESULTS), measurements, Path(name or folder.absolute()).name)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        warnings.warn(
            f"{folder / CARD} was left as it is, because its metadata cannot be read: mend them, or remove the file.",
            Notice,
            stacklevel=2,
        )
        return
    if results:
        card.data[RESULTS] = results
    else:
        card.data.pop(RESULTS)
    part = About.of(folder).part(measurements, name, "license" in card.data)
    card.text = MARKED.sub(lambda _: part, card.text, count=1)
    write_file(folder / CARD, str(card) if len(card.data) else card.text)


def _results(found: Any, measurements: Measurements, model: str) -> list[dict[str, Any]]:
    """The results of the metadata, with besa's own replaced.

    Raises:
        ValueError, TypeError, AttributeError: what was found has another form.
    """
    entries = [dict(entry) for entry in found or []]
    for entry in entries:
        entry["results"] = [result for result in entry.get("results") or [] if not _is_own(result)]
    if measurements.rows:
        (own,) = eval_results_to_model_index(model, [_result(row, measurements) for row in measurements.rows])
        if entries:
            entries[0]["results"] += own["results"]
        else:
            entries.append(own)
    return [entry for entry in entries if entry["results"]]


def _is_own(result: Mapping[str, Any]) -> bool:
    """Whether besa wrote a result of the metadata."""
    metrics = result.get("metrics") or []
    return bool(metrics) and all(MEASURED_BY in (metric.get("args") or {}) for metric in metrics)


def _result(row: Measurement, measurements: Measurements) -> EvalResult:
    """A number as the Hub reads it; infinity, which JSON does not have, as a word."""
    arguments: dict[str, Any] = {MEASURED_BY: f"besa {measurements.version}".strip()}
    if row.stderr is not None:
        arguments["stderr"] = row.stderr
    return EvalResult(
        task_type=TASK,
        task_name="Text Generation",
        dataset_type=row.dataset,
        dataset_name=row.name,
        dataset_config=row.config,
        dataset_split=row.split,
        metric_type=row.metric,
        metric_name=f"{row.metric} ({row.basis})",
        metric_value=row.value if math.isfinite(row.value) else "infinite",
        metric_args=arguments,
    )


def _terms(base: Path | None) -> dict[str, Any]:
    """Licence and languages in the card of another model, as metadata; empty if it has no card or says nothing.

    The card was written by others: whatever is no plain name or link is not taken, and a notice says so.
    """
    if base is None or not (base / CARD).is_file():
        return {}
    try:
        block = REGEX_YAML_BLOCK.search(_read(base / CARD))
        metadata = yaml.safe_load(block[2]) if block else {}
        found = {key: (metadata or {}).get(key) for key in ("license", "license_name", "license_link", "language")}
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError):
        found = {"license": ()}  # nothing that a licence can be
    shapes = {"license": LICENCE, "license_name": re.compile(r"[^\s`<>|](.{0,98}[^\s`<>|])?"), "license_link": LINK}
    terms = {key: value for key, value in found.items() if value is not None}
    for key, value in terms.items():
        several = key in ("license", "language") and isinstance(value, list) and 0 < len(value) <= 64
        shape = shapes.get(key, LANGUAGE)
        parts = value if several else [value]
        if not all(isinstance(part, str) and part.isprintable() and shape.fullmatch(part) for part in parts):
            warnings.warn(
                f"The licence was not taken over from {base / CARD}, because its metadata cannot be read: see for "
                "yourself, and write it into the card of the new model.",
                Notice,
                stacklevel=2,
            )
            return {}
    return terms


def _read(card: Path) -> str:
    """The text of a card.

    Raises:
        ValueError: it is no text, or too long for a card.
    """
    if card.stat().st_size > LARGEST:
        raise ValueError("too long")
    return card.read_text(encoding="utf-8-sig")
