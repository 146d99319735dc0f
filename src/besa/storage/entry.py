"""besa's entry in the configuration of a model: what it says of pruning, packing and shrinking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def besa_entry(config: Mapping[str, Any]) -> dict[str, Any]:
    """besa's entry; empty if there is none, or if it holds no settings.

    Args:
        config: content of config.json, or the attributes of a configuration of transformers.
    """
    entry = config.get("besa")
    return entry if isinstance(entry, dict) else {}
