"""What is wrong with a recipe, in one sentence, where pydantic would write several lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

FORMER = {"allocation.epochs": "set allocation.steps, the number of learning steps"}  # keys that are no more
PATTERNS = {  # what the settings with patterns must be, in words
    "skip": "a list of patterns, such as ['*.k_proj']",
    "sparsity_of": "patterns with a sparsity each, such as {'*.k_proj': 0.3}",
}


def first_complaint(error: ValidationError, fields: Mapping[str, FieldInfo]) -> str:
    """The first thing that is wrong with a recipe, and what to do where that is known.

    Args:
        error: of a recipe that was refused.
        fields: of recipes, by name; those of stages name their methods.
    """
    complaint = error.errors()[0]
    if complaint["type"] == "value_error":  # one of besa's own sentences
        return str(complaint["ctx"]["error"])
    # Of three or more parts, the second is the method's tag. Pydantic adds it; it is no key of the YAML.
    keys = [str(key) for at, key in enumerate(complaint["loc"]) if at != 1 or len(complaint["loc"]) == 2]
    place = " ".join(".".join(keys).split())
    if complaint["type"] == "extra_forbidden":
        return f"unknown key {place}: {FORMER[place]}" if place in FORMER else f"unknown key {place}"
    if complaint["type"] == "union_tag_invalid":
        return (
            f"{place}.method is {complaint['ctx']['tag']!r:.80} but must be one of {complaint['ctx']['expected_tags']}"
        )
    if complaint["type"] == "union_tag_not_found":
        return _without_method(place, complaint["input"], _methods(fields[place]))
    if complaint["type"] == "model_attributes_type":
        methods = ", ".join(_methods(fields[place]))
        return f"{place} is {complaint['input']!r:.80} but holds settings: set {place}.method to one of {methods}"
    if complaint["type"] in ("tuple_type", "dict_type") and place in PATTERNS:
        return f"{place} is {complaint['input']!r:.80} but must be {PATTERNS[place]}"
    message = complaint["msg"][0].lower() + complaint["msg"][1:]
    percent = complaint["type"].startswith("less_than") and "sparsity" in place
    return f"{place}: {message} (it is {complaint['input']!r:.80}{'; half is 0.5' if percent else ''})"


def _without_method(stage: str, settings: Mapping[str, object], methods: Mapping[str, frozenset[str]]) -> str:
    """What to do about settings of a stage that do not say of which of its methods they are."""
    able = [name for name, known in methods.items() if known.issuperset(settings)]
    choice = f"={able[0]}" if len(able) == 1 else f" to one of {', '.join(able or methods)}"
    key = f"{stage}.{' '.join(str(next(iter(settings))).split()):.80}" if settings else stage
    return f"{key} needs a method: set {stage}.method{choice}"


def _methods(stage: FieldInfo) -> dict[str, frozenset[str]]:
    """The methods of a stage by name, each with the names of its settings."""
    kinds = get_args(stage.annotation)
    return {kind.model_fields["method"].default: frozenset(kind.model_fields) for kind in kinds}
