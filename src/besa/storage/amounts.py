"""Bytes in words, for people: on pages of the report and in a terminal."""

from __future__ import annotations

UNITS = ((1e6, "MB"), (1e3, "kB"))  # powers of ten


def in_words(size: float) -> str:
    """Bytes in GB with two decimals, or as a whole number of the largest unit that they have one of."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    unit, name = next((pair for pair in UNITS if size >= pair[0]), (1, "bytes"))
    return f"{size / unit:,.0f} {name}"
