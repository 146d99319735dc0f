"""The recipes that come with besa, as files: their names, and what each is for. Nothing heavy is imported here."""

from __future__ import annotations

from importlib import resources

RECIPES = resources.files("besa.methods") / "recipes"


def shipped() -> list[str]:
    """Names of the recipes that come with besa."""
    return sorted(entry.name.removesuffix(".yaml") for entry in RECIPES.iterdir() if entry.name.endswith(".yaml"))


def purpose(name: str) -> str:
    """What a shipped recipe is for: the comment in the first line of its file."""
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
