"""The one rule of verdicts, with numbers worked out by hand."""

import math

import pytest

from experiments.judging import RULE, UNTRIED, Verdict, changes, decided, judged, ruled, together


@pytest.mark.parametrize(
    ("differences", "bounds", "holds", "points"),
    [
        ([-1.0, -2.0, -3.0], {"most": 0}, True, True),  # mean -2, standard error 1/√3: 2 · 0.577 < 2
        ([1.0, 2.0, 3.0], {"most": 0}, False, False),
        ([-1.0, -2.0, 3.0], {"most": 0}, None, False),  # mean 0: neither
        ([-0.5, -2.5, -3.0], {"most": 0}, True, True),  # -2 ± 0.764: 2 · 0.764 = 1.53
        ([0.5, -3.0, -3.5], {"most": 0}, None, True),  # -2 ± 1.258: the spread covers 0
        ([-2.0], {"most": 0}, None, True),  # one point
        ([0.1, 0.2, 0.3], {"least": -2, "most": 2}, True, True),
        ([2.9, 3.0, 3.1], {"least": -2, "most": 2}, False, False),
        ([1.0, 2.0, 3.0], {"least": -2, "most": 2}, None, False),
        ([0.0, 0.0], {"most": 0}, None, False),  # equal is not below
        ([5.0, 6.0], {"least": 0}, True, True),
        ([math.inf, -1.0], {"most": 0}, None, False),
    ],
)
def test_a_claim_holds_where_the_mean_is_two_standard_errors_inside(differences, bounds, holds, points) -> None:
    found = judged(differences, **bounds)
    assert (found.holds, found.points) == (holds, points)


def test_the_error_is_that_of_the_mean_of_pairs() -> None:
    found = judged([-1.0, -2.0, -3.0], most=0)
    assert (found.mean, found.stderr) == (-2.0, pytest.approx(1 / 3**0.5))
    assert found.words() == "-2.0 ± 0.6 %"
    assert judged([-2.0]).words(" points", 2) == "-2.00 points"
    assert changes([90.0, 110.0], [100.0, 100.0, 1.0]) == pytest.approx([-10.0, 10.0])
    assert decided(1.0, 0.49, least=0).holds is True
    assert decided(1.0, 0.51, least=0).holds is None


def test_several_claims_hold_together_or_not() -> None:
    assert together([True, True]) is True
    assert together([True, None]) is None
    assert together([None, False]) is False
    yes, no, one = judged([-1.0, -1.1], most=0), judged([1.0, 1.1], most=0), judged([-1.0], most=0)
    assert ruled("a", [yes, one]) == Verdict("a", None, True)
    assert ruled("a", [yes, no, one]) == Verdict("a", False, False)
    assert [ruled("a", each).words for each in ([yes], [no], [one], [UNTRIED])] == [
        "yes", "no", "open; means say yes", "open",
    ]  # fmt: skip
    assert "2 standard errors" in RULE
