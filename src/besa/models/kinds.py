"""The common name of the linears that have the same place in every block, and its shortest unambiguous form."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from besa.models.prunable import everywhere


def kind(name: str, block: str) -> str:
    """Path of a linear inside its block, with the number of an expert replaced by a star."""
    return everywhere(name.removeprefix(f"{block}."))


def shortened(kinds: Sequence[str]) -> list[str]:
    """The shortest ending of each path that no other path has: `q_proj`; `attn.c_proj` beside `mlp.c_proj`."""
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
