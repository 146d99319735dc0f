"""The one rule of verdicts, with numbers worked out by hand."""

import math

import numpy as np
import pytest

from experiments.judging import RULE, UNTRIED, Judged, Verdict, changes, judged, ruled, together
from tests.slowly import some_slow


@pytest.mark.parametrize(
    ("differences", "bounds", "holds", "points"),
    [
        ([-1.0, -1.5, -2.0], {"most": 0}, True, True),  # -1.5 ± 0.289: 4.303 · 0.289 = 1.242
        ([1.0, 1.5, 2.0], {"most": 0}, False, False),
        ([-1.0, -2.0, -3.0], {"most": 0}, None, True),  # -2 ± 0.577: 4.303 · 0.577 = 2.48
        ([-1.0, -2.0, 3.0], {"most": 0}, None, False),  # mean 0: neither
        ([-2.0], {"most": 0}, None, True),  # one point
        ([0.1, 0.2, 0.3], {"least": -2, "most": 2}, True, True),
        ([2.9, 3.0, 3.1], {"least": -2, "most": 2}, False, False),
        ([1.0, 2.0, 3.0], {"least": -2, "most": 2}, None, False),
        ([0.0, 0.0], {"most": 0}, None, False),  # equal is not below
        ([5.0, 6.0], {"least": 0}, None, True),  # 5.5 ± 0.5: 12.706 · 0.5 = 6.35
        ([5.0, 5.5], {"least": 0}, True, True),  # 5.25 ± 0.25: 3.18
        ([math.inf, -1.0], {"most": 0}, None, False),
    ],
)
def test_a_claim_holds_where_its_interval_is_inside(differences, bounds, holds, points) -> None:
    found = judged(differences, **bounds)
    assert (found.holds(), found.points) == (holds, points)


@pytest.mark.parametrize("seeds", some_slow([2, 3, 5], {2, 5}))
def test_of_noise_one_verdict_in_twenty_is_wrong_at_most(seeds) -> None:
    """Differences that have no sign, of 16 claims together: they fail by chance in 5 per cent of cases."""
    drawn = np.random.default_rng(0).normal(size=(4000, 16, seeds))
    alone = [judged(differences, most=0).holds() for differences in drawn[:, 0].tolist()]
    assert sum(holds is not None for holds in alone) / len(alone) == pytest.approx(0.05, abs=0.012)
    of_all = [ruled("a", [judged(each, most=0) for each in claims]).holds for claims in drawn[:1000].tolist()]
    assert True not in of_all
    assert of_all.count(False) / len(of_all) < 0.05


def test_the_error_is_that_of_the_mean_of_pairs() -> None:
    found = judged([-1.0, -2.0, -3.0], most=0)
    assert (found.mean, found.stderr) == (-2.0, pytest.approx(1 / 3**0.5))
    assert found.words() == "-2.0 ± 0.6 %"
    assert judged([-2.0]).words(" points", 2) == "-2.00 points"
    assert changes([90.0, 110.0], [100.0, 100.0, 1.0]) == pytest.approx([-10.0, 10.0])
    assert Judged(1.0, 0.50, 1000, least=0).holds() is True  # 1.962 standard errors decide
    assert Judged(1.0, 0.52, 1000, least=0).holds() is None


def test_several_claims_hold_together_or_not() -> None:
    assert together([True, True]) is True
    assert together([True, None]) is None
    assert together([None, False]) is False
    yes, no, one = judged([-1.0, -1.01], most=0), judged([1.0, 1.01], most=0), judged([-1.0], most=0)
    assert ruled("a", [yes, one]) == Verdict("a", None, True)
    assert ruled("a", [yes, no, one]) == Verdict("a", False, False)
    assert [ruled("a", each).words for each in ([yes], [no], [one], [UNTRIED])] == [
        "yes", "no", "open; means say yes", "open",
    ]  # fmt: skip
    assert "Student's 95% interval" in RULE


def test_that_one_of_several_claims_fails_takes_more() -> None:
    """Alone it is 4.303 standard errors away at least; of two, 6.205 (Bonferroni)."""
    fails, holds = Judged(1.0, 0.2, 3, most=0), Judged(-1.0, 0.2, 3, most=0)
    assert ruled("a", [fails]).holds is False
    assert ruled("a", [fails, holds]).holds is None
    assert ruled("a", [Judged(1.0, 0.15, 3, most=0), holds]).holds is False
    assert ruled("a", [holds, holds]).holds is True
