"""What a shell may complete: names of recipes and devices. Nothing heavy is imported, as a shell waits for it."""

from __future__ import annotations

from besa.methods.shipped import shipped

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")


def recipe(incomplete: str) -> list[str]:
    """Names of recipes that begin so."""
    return [name for name in shipped() if name.startswith(incomplete)]


def recipes(incomplete: str) -> list[str]:
    """Names of recipes, separated by commas, of which the last one is completed."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in recipe(last) if name not in before.split(",")]


def device(incomplete: str) -> list[str]:
    """Names of devices that begin so."""
    return [name for name in DEVICES if name.startswith(incomplete)]
