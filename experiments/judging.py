"""The one rule that verdicts follow: what the spread of paired differences allows to say.

A claim is that a difference lies between two bounds, such as below zero. Differences are paired: of the same seed, or
of the same question. The claim holds where the mean lies inside by more than two standard errors of it, and does not
where it lies outside by as much. Else it is open, and so it is where there is one difference only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan, sqrt
from statistics import mean, stdev

YES = {True: "yes", False: "no"}
ERRORS = 2.0  # standard errors that decide
RULE = (
    "Differences are paired by seed or question, ± their standard error. A claim holds, or does not, where the mean is "
    f"more than {ERRORS:g} standard errors from its bound; else it is open, and of one seed always."
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
        holds: None where that is open.
        points: whether the mean alone lies where the claim says; None where nothing was found.
    """

    mean: float
    stderr: float | None
    holds: bool | None
    points: bool | None

    def words(self, unit: str = " %", digits: int = 1) -> str:
        """The difference with its error."""
        error = "" if self.stderr is None else f" ± {self.stderr:,.{digits}f}"
        return f"{self.mean:+,.{digits}f}{error}{unit}"


UNTRIED = Judged(nan, None, None, None)


def judged(differences: Sequence[float], least: float = -inf, most: float = inf) -> Judged:
    """Whether differences, one for each seed, lie between bounds."""
    error = stdev(differences) / sqrt(len(differences)) if len(differences) > 1 and _finite(differences) else None
    return decided(mean(differences), error, least, most)


def decided(difference: float, stderr: float | None, least: float = -inf, most: float = inf) -> Judged:
    """Whether a difference with a standard error lies between bounds."""
    holds = None
    if stderr is not None:
        low, high = difference - ERRORS * stderr, difference + ERRORS * stderr
        if least < low and high < most:
            holds = True
        elif high < least or most < low:
            holds = False
    return Judged(difference, stderr, holds, least < difference < most)


def together(claims: Iterable[bool | None]) -> bool | None:
    """Whether all of several claims hold: one that does not decides, and else one that is open."""
    found = list(claims)
    return False if False in found else None if None in found else True


def ruled(found: str, judgements: Sequence[Judged]) -> Verdict:
    """The verdict on several claims that belong together."""
    holds = together(one.holds for one in judgements)
    return Verdict(found, holds, together(one.points for one in judgements))


def changes(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """By how much per cent each of ours differs from its pair; the pairs of the last seed may be missing."""
    return [100 * (one / other - 1) for one, other in zip(ours, theirs, strict=False)]


def _finite(numbers: Iterable[float]) -> bool:
    return all(map(isfinite, numbers))
