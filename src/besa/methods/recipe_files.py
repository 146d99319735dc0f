"""Recipes as files: YAML without aliases, and settings that replace those of a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from besa.errors import BesaError
from besa.methods.shipped import RECIPES, shipped
from besa.storage.names import path_of

DEEPEST = 8  # levels of YAML


def content_of(
    recipe: str | Path, sparsity: float | None, overrides: Sequence[str], keys: Iterable[str]
) -> dict[str, Any]:
    """The content of a recipe's file with other settings in place of its own.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file.
        sparsity: replaces the file's own.
        overrides: ``key.key=value`` pairs, the value in YAML, applied last. A pair that changes a method drops the
            settings of the former method.
        keys: that a recipe may have, for the message.

    Raises:
        BesaError: there is no such recipe, or it is no YAML, or has a key twice; or a pair is none, or sets a part of
            a value.
    """
    content = _read(recipe, keys)
    if sparsity is not None:
        content["sparsity"] = sparsity
    for override in sorted(overrides, key=lambda pair: not pair.partition("=")[0].endswith(".method")):
        _override(content, override)  # methods first, because a new method drops the settings of the former
    return content


def twice(names: Sequence[str]) -> str | None:
    """The first name that appears again; None if all are different."""
    return next((name for at, name in enumerate(names) if name in names[:at]), None)


def _read(recipe: str | Path, keys: Iterable[str]) -> dict[str, Any]:
    if recipe == "":
        raise BesaError(f"The name of the recipe is empty: choose one of {', '.join(shipped())}, or give a YAML file.")
    source = RECIPES / f"{recipe}.yaml" if str(recipe) in shipped() else path_of(recipe)
    if isinstance(source, Path) and source.exists() and not source.is_file():  # reading a pipe would wait forever
        raise BesaError(f"Recipe {recipe} is no file: choose one of {', '.join(shipped())}, or give a YAML file.")
    try:
        content = _yaml(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BesaError(f"No recipe {recipe}: choose one of {', '.join(shipped())}, or give a YAML file.") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise BesaError(f"Recipe {recipe} cannot be read as YAML: {reason}.") from None
    if not isinstance(content, dict) or not content:
        raise BesaError(f"Recipe {recipe} must be a YAML mapping with some of the keys {', '.join(keys)}.")
    return content


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases and not deeper than recipes: a few lines of aliases can expand beyond any memory."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEEPEST or self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"it has aliases, or more than {DEEPEST} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if key := twice(keys):
                raise yaml.YAMLError(f"it has the key {key} twice")
        return node


def _yaml(text: str) -> Any:
    return yaml.load(text, _PlainLoader)


def _override(content: dict[str, Any], override: str) -> None:
    path, separator, value = override.partition("=")
    *parents, key = path.split(".")
    shown = " ".join(override.split())
    if not separator or not key:
        raise BesaError(f"--set {shown}: write it as key.key=value, such as allocation.steps=64.")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise BesaError(f"--set {shown}: {parent} is a value, not a group of settings.")
    try:
        chosen = _yaml(value)
    except (yaml.YAMLError, ValueError):  # ValueError: 2001-99-99
        raise BesaError(f"--set {shown}: the value is not YAML.") from None
    if key == "method" and content.get(key) != chosen:
        content.clear()
    content[key] = chosen
