"""Frequency: the experts that the router chooses least go.

Shape suffixes: E experts of a mixture.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from besa.methods.dropping.dropper import Scorer
from besa.observing.contributions import Contributions


class Frequency(Scorer):
    """Drop the experts that get the fewest tokens."""

    method: Literal["frequency"] = "frequency"

    def score(self, contributions: Contributions) -> Tensor:
        """The number of tokens of each expert (E,)."""
        return contributions.tokens_E
