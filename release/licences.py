"""Write docs/licences.md: the licence of everything that besa asks to be installed, from what is installed here.

`python release/licences.py`, in the environment of `make setup`; a test compares the direct dependencies.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licences.md"
HEAD = """# Licences of dependencies

besa itself is under the Apache License 2.0. It brings no code of others. What it asks to be installed has these
licences, as the packages state them. Written by `python release/licences.py`.
"""
# What some packages state in other words, or as their whole text, by SPDX identifiers.
SPDX = {
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "Apache": "Apache-2.0",
    "Apache2": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "BSD 2-Clause License": "BSD-2-Clause",
    "ISC License": "ISC",
    "LGPL-3.0-or-newer": "LGPL-3.0-or-later",
    "PSFL": "PSF-2.0",
    "BSD License": "BSD",
    "BSD": "BSD",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
ELSEWHERE = {"vllm": "Apache-2.0"}  # of what `make setup` does not install


def direct() -> dict[str, list[Requirement]]:
    """Direct dependencies, by the extra that brings them; that of all users is ""."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"": project["dependencies"]} | project["optional-dependencies"]
    return {extra: [Requirement(one) for one in wanted] for extra, wanted in groups.items()}


def licence(name: str) -> str:
    """The licence that a package states: an expression, a field or a classifier.

    Raises:
        PackageNotFoundError: it is not installed here.
    """
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    about = metadata.metadata(name)
    if expression := about.get("License-Expression"):
        return expression
    found = [one.rpartition(" :: ")[2] for one in about.get_all("Classifier") or [] if one.startswith("License ::")]
    stated = (about.get("License") or "").strip()
    text = (
        stated
        if stated not in ("", "UNKNOWN") and "\n" not in stated and len(stated) < 60
        else (found or ["not stated"])[0]
    )
    return SPDX.get(text, text)


def indirect(requirements: list[Requirement]) -> list[str]:
    """Names of what direct dependencies bring here, and what that brings."""
    known, seen, waiting, found = {_normal(one.name) for one in requirements}, set[str](), [*requirements], set[str]()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        try:
            wanted = metadata.requires(requirement.name) or []
        except metadata.PackageNotFoundError:
            continue
        for one in map(Requirement, wanted):
            extras = ("", *requirement.extras)
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(one)
                found |= {_normal(one.name)} - known
    return sorted(found)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lines() -> Iterator[str]:
    """The page."""
    yield HEAD
    for extra, requirements in direct().items():
        yield f"## {f'Extra `{extra}`' if extra else 'Always'}\n"
        yield "| package | licence |\n|---|---|"
        yield from rows(list(dict.fromkeys(one.name for one in requirements)))
        yield ""
    yield "## What these bring\n"
    yield "| package | licence |\n|---|---|"
    yield from rows(indirect([one for requirements in direct().values() for one in requirements]))


def rows(names: list[str]) -> Iterator[str]:
    """A line of a table for each package; those that are not for this system are left out."""
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            yield f"| {name} | {licence(name)} |"


if __name__ == "__main__":
    PAGE.write_text("\n".join(lines()) + "\n", encoding="utf-8")
