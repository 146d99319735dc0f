"""Rows of results that were made in two parts, each with seeds of its own."""

from __future__ import annotations

from besa.studies.rows import Row


def joined(first: Row, second: Row, dense: Row | None = None) -> Row:
    """Join two rows, which may come from other machines; answers to questions are not compared again.

    Args:
        first: whose seeds come first.
        second: of the same recipe.
        dense: row of the dense model, to compare with.
    """

    def weighed(one: float | None, other: float | None) -> float | None:
        if one is None or other is None:
            return None
        return (one * first.seeds + other * second.seeds) / (first.seeds + second.seeds)

    return Row.of(
        first.recipe,
        first.settings,
        {score: values + second.values[score] for score, values in first.values.items()},
        dense.mean if dense else {},
        sparsity=weighed(first.sparsity, second.sparsity) or 0.0,
        seconds=weighed(first.seconds, second.seconds),
        origin=first.origin if first.origin == second.origin else None,
        notes=list(dict.fromkeys([*first.notes, *second.notes])),
    )
