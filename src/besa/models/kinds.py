"""Linears that play the same part in every block: their common name, and how short it can be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence


def kind(name: str, block: str) -> str:
    """Path of a linear inside its block; experts share one, their number replaced by a star."""
    return ".".join("*" if step.isdigit() else step for step in name.removeprefix(f"{block}.").split("."))


def shortened(kinds: Sequence[str]) -> list[str]:
    """For each of several paths the shortest ending that no other has: `q_proj`; `attn.c_proj` beside `mlp.c_proj`."""
    endings: dict[str, set[str]] = defaultdict(set)
    for path in kinds:
        steps = path.split(".")
        for start in range(len(steps)):
            endings[".".join(steps[start:])].add(path)
    shortest = []
    for path in kinds:
        steps = path.split(".")
        candidates = (".".join(steps[start:]) for start in reversed(range(len(steps))))
        shortest.append(next((ending for ending in candidates if len(endings[ending]) == 1), path))
    return shortest
