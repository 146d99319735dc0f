"""The one rule that verdicts follow: what the spread of paired differences allows to say.

A claim is that a difference lies between two bounds, such as below zero. Differences are paired: of the same seed, or
of the same question. The claim holds where the confidence interval of the mean lies inside, and does not where the
interval lies outside. Else it is open, and so it is where there is one difference only.

The interval is Student's, which is wide where seeds are few: 4.3 standard errors to each side with three seeds. Several
claims hold together where each does. That one of them does not is said of an interval that is as much wider as it
takes for all to be right together (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan, sqrt
from statistics import mean, stdev

from scipy.special import stdtrit

YES = {True: "yes", False: "no"}
CONFIDENCE = 0.95
RULE = (
    "Differences are paired by seed, or for accuracies by question, ± their standard error. A claim holds, or does "
    f"not, where Student's {CONFIDENCE:.0%} interval of the mean lies on one side of its bound; else it is open, as "
    "it is of one seed where seeds are the pairs. Pairs of questions say nothing of other calibration samples."
)


@dataclass(frozen=True)
class Verdict:
    """Whether a claim is there.

    Attributes:
        found: what was found, in a sentence with its numbers.
        holds: whether that is what was claimed; None where it is open.
        points: whether the means alone would say so.
    """

    found: str
    holds: bool | None
    points: bool | None = None

    @property
    def words(self) -> str:
        """Yes, no, or open and what the means say."""
        if self.holds is not None:
            return YES[self.holds]
        return "open" if self.points is None else f"open; means say {YES[self.points]}"


@dataclass(frozen=True)
class Judged:
    """What paired differences say of a claim.

    Attributes:
        mean: of the differences.
        stderr: of the mean; None where there is one difference.
        pairs: their number.
        least: the claim's lower bound.
        most: its upper bound.
    """

    mean: float
    stderr: float | None
    pairs: int
    least: float = -inf
    most: float = inf

    @property
    def points(self) -> bool | None:
        """Whether the mean alone lies where the claim says; None where nothing was found."""
        return self.least < self.mean < self.most if self.pairs else None

    def holds(self, claims: int = 1) -> bool | None:
        """Whether the interval lies where the claim says; None where that is open.

        Args:
            claims: as many intervals as this are right together, with the same confidence.
        """
        if self.stderr is None:
            return None
        reach = float(stdtrit(self.pairs - 1, 1 - (1 - CONFIDENCE) / (2 * claims))) * self.stderr
        low, high = self.mean - reach, self.mean + reach
        if self.least < low and high < self.most:
            return True
        return False if high < self.least or self.most < low else None

    def words(self, unit: str = " %", digits: int = 1) -> str:
        """The difference with its error."""
        error = "" if self.stderr is None else f" ± {self.stderr:,.{digits}f}"
        return f"{self.mean:+,.{digits}f}{error}{unit}"


UNTRIED = Judged(nan, None, 0)


def judged(differences: Sequence[float], least: float = -inf, most: float = inf) -> Judged:
    """What differences, one for each seed, say of a claim that they lie between bounds."""
    error = stdev(differences) / sqrt(len(differences)) if len(differences) > 1 and _finite(differences) else None
    return Judged(mean(differences), error, len(differences), least, most)


def together(claims: Iterable[bool | None]) -> bool | None:
    """Whether all of several claims hold: one that does not decides, and else one that is open."""
    found = list(claims)
    return False if False in found else None if None in found else True


def ruled(found: str, judgements: Sequence[Judged]) -> Verdict:
    """The verdict on several claims that belong together."""
    fails = any(one.holds(len(judgements)) is False for one in judgements)
    holds = False if fails else all(one.holds() for one in judgements) or None
    return Verdict(found, holds, together(one.points for one in judgements))


def changes(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """By how much per cent each of ours differs from its pair; the pairs of the last seed may be missing."""
    return [100 * (one / other - 1) for one, other in zip(ours, theirs, strict=False)]


def _finite(numbers: Iterable[float]) -> bool:
    return all(map(isfinite, numbers))
