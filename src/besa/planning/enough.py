"""Whether a calibration set has enough tokens for what is solved with it."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from besa.methods.recipe import Recipe
from besa.models.blocks import Block

# Tokens for each column of a Gram matrix, at least. Of C independent columns and n tokens, its eigenvalues are off by
# factors of up to (1 ± √(C/n))² (Marchenko and Pastur): from n = 4 C on, by 1/4 to 9/4 at the most.
ENOUGH = 4


def few_tokens(
    recipe: Recipe, blocks: Iterable[Block], pruned: Collection[str], samples: int, seqlen: int
) -> list[str]:
    """A sentence on tokens that are few for the widest matrix, if the recipe needs Gram matrices; else none.

    Args:
        recipe: the method.
        blocks: of the model.
        pruned: full names of the linears that are pruned.
        samples: calibration sequences.
        seqlen: tokens of each.
    """
    tokens = samples * seqlen
    widths = [prunable.columns for block in blocks for name, prunable in block.prunables.items() if name in pruned]
    widest = max(widths, default=0)
    if not recipe.needs_gram or tokens >= ENOUGH * widest:
        return []
    return [
        f"{tokens:,} calibration tokens are few for inputs of {widest:,} columns, and solving for weights may fit "
        f"these tokens only: give at least {ENOUGH} tokens for each column, such as --samples "
        f"{-(-ENOUGH * widest // seqlen):,}."
    ]
