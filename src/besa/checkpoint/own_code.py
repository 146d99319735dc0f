"""The files that model code of its own consists of and reads, in a model's folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_imports

CONFIGURATIONS = ("config.json", "*_config.json")  # files that may name classes of the model's own


def modules_of(folder: Path) -> set[str]:
    """Names of the .py files that transformers loads: those that configurations name, and what these import."""
    waiting = {place.rpartition(".")[0] for text in _configurations(folder) for place in _places(_parsed(text))}
    modules: set[str] = set()
    while waiting:
        name = f"{waiting.pop()}.py"
        if name not in modules and (folder / name).is_file():
            modules.add(name)
            waiting.update(_imported(folder / name))
    return modules


def named(folder: Path, modules: Iterable[str], names: Iterable[str]) -> set[str]:
    """Those of the names that configurations or modules mention, such as vocabularies of a tokenizer of its own.

    Args:
        folder: of the model.
        modules: names of its .py files that transformers loads.
        names: of files that may belong to it.
    """
    texts = [*_configurations(folder), *((folder / name).read_text("utf-8", "replace") for name in modules)]
    return {name for name in names if any(re.search(rf"(?<![\w-]){re.escape(name)}", text) for text in texts)}


def _configurations(folder: Path) -> list[str]:
    """The texts of all configurations in a folder."""
    paths = (path for path in folder.iterdir() if any(fnmatchcase(path.name, pattern) for pattern in CONFIGURATIONS))
    return [path.read_text("utf-8", "replace") for path in sorted(paths) if path.is_file()]


def _parsed(text: str) -> Any:
    """The content of a configuration; None if it is damaged, which is refused where it is read."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _places(content: Any) -> Iterator[str]:
    """Where classes of the model's own are, as ``module.Class``, anywhere in a configuration."""
    if isinstance(content, list):
        content = dict(enumerate(content))
    for key, value in content.items() if isinstance(content, dict) else ():
        if key == "auto_map":
            yield from (place for place in _strings(value) if "--" not in place)  # else in another repository
        elif key == "impl":  # of a pipeline
            yield from _strings(value)
        else:
            yield from _places(value)


def _strings(value: Any) -> Iterator[str]:
    """All texts in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _imported(module: Path) -> list[str]:
    """The modules beside it that a module imports; none if it is no text."""
    try:
        return list(get_relative_imports(module))
    except ValueError:
        return []
