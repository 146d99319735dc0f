"""The interface of methods that drop experts.

Shape suffixes: E experts of a mixture.
"""

from __future__ import annotations

from abc import abstractmethod
from math import ceil

import torch
from pydantic import Field
from torch import Tensor

from besa.errors import BesaError
from besa.models.mixtures import Mixtures
from besa.observing.contributions import Contributions
from besa.settings import Settings


class Dropper(Settings):
    """Base of all methods. By default all experts stay."""

    @property
    def scoring(self) -> Scorer | None:
        """The method that scores experts and says how many stay; None if all do."""
        return None


class Scorer(Dropper):
    """Base of methods that drop the experts of the lowest scores, the same number of every mixture."""

    share: float = Field(default=0.25, gt=0, lt=1, description="of the experts of each mixture that go")
    number: int | None = Field(default=None, ge=1, description="of the experts that go, in place of the share")

    @property
    def scoring(self) -> Scorer:
        """Itself."""
        return self

    def kept(self, mixtures: Mixtures) -> int:
        """How many experts of each mixture stay. A share becomes the nearest number that leaves groups of one size.

        Of two as near, the smaller number goes.

        Raises:
            BesaError: none would go, groups would differ, or a token would have too few to choose from.
        """
        experts, groups = mixtures.experts, mixtures.groups
        gone = groups * ceil(self.share * experts / groups - 0.5) if self.number is None else self.number
        asked = f"experts.share={self.share:g}" if self.number is None else f"experts.number={self.number}"
        if gone % groups:
            raise BesaError(
                f"{asked} leaves groups of different sizes, but this model chooses among {groups} groups of experts of "
                f"one size: drop a multiple of {groups}."
            )
        if not 0 < gone <= experts - mixtures.least:
            raise BesaError(
                f"{asked} drops {gone} of {experts} experts of each block, but at least {groups} must go, and "
                f"{mixtures.least} stay for a token to choose from."
            )
        return experts - gone

    @abstractmethod
    def score(self, contributions: Contributions) -> Tensor:
        """How much each expert matters (E,); the lowest go."""


def highest(scores_E: Tensor, kept: int, groups: int) -> list[int]:
    """The experts that stay, in their order: those with the highest scores, the same number of each group.

    Args:
        scores_E: of a mixture.
        kept: how many stay.
        groups: of consecutive experts, all of one size. Of equal scores, the earlier expert goes.
    """
    stay = []
    size = len(scores_E) // groups
    for start in range(0, len(scores_E), size):
        order = torch.argsort(scores_E[start : start + size], stable=True)
        stay += [start + place for place in sorted(order[size - kept // groups :].tolist())]
    return stay
