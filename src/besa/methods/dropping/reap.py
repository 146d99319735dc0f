"""REAP: router-weighted expert activation pruning (Lasby et al., "REAP the Experts", 2025, arXiv 2510.13999).

Shape suffixes: E experts of a mixture.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from besa.methods.dropping.dropper import Scorer
from besa.observing.contributions import Contributions


class Reap(Scorer):
    """Drop the experts that add least to the tokens that they get: mean over these of gate · ‖output‖₂."""

    method: Literal["reap"] = "reap"

    def score(self, contributions: Contributions) -> Tensor:
        """The mean norm of what each expert adds to a token (E,); 0 for an expert that got none."""
        return contributions.norms_E / contributions.tokens_E.clamp_min(1)
