"""Exact budgets against brute force in whole numbers and fractions."""

import heapq
import math
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from besa.counting.budget import cheapest, check_room, enough_for, split, zeros_for
from besa.errors import BesaError
from besa.methods.apportioning import apportion

SIZES = st.lists(st.integers(1, 50) | st.integers(1, 10**15), min_size=1, max_size=8)


def apportioned(rates, widths, total, least) -> list[int]:
    counts = apportion(torch.tensor(rates), torch.tensor(widths), total, torch.tensor(least))
    assert counts.dtype == torch.int64
    return counts.tolist()


@pytest.mark.parametrize(
    ("sparsity", "weights", "zeros"),
    [(0.5, 5, 2), (0.5, 7, 4), (0.0, 9, 0), (0.07, 100, 7), (0.7, 106_168_320, 74_317_824), (0.999, 3, 3)],
)
def test_zeros_for(sparsity, weights, zeros):
    assert zeros_for(sparsity, weights) == zeros


@given(SIZES, st.data())
@settings(deadline=None)
def test_split_is_exact_and_proportional(sizes, data):
    whole = sum(sizes)
    total = data.draw(st.integers(0, whole))
    parts = split(total, sizes)
    assert len(parts) == len(sizes)
    assert sum(parts) == total
    assert all(0 <= part <= size for part, size in zip(parts, sizes, strict=True))
    for k in range(len(sizes) + 1):
        assert abs(sum(parts[:k]) - Fraction(total * sum(sizes[:k]), whole)) <= Fraction(1, 2)


def test_split_evenly():
    assert split(12, [8, 8, 8]) == [4, 4, 4]
    assert split(2**61 + 1, [2**61, 2**61]) == [2**60 + 1, 2**60]  # beyond the whole numbers of a float


@st.composite
def small_problems(draw):
    """Up to four rows of up to five weights; the rates are in 64ths, so that their squares are exact."""
    widths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    rates = [draw(st.integers(-32, 96)) / 64 for _ in widths]
    least = [draw(st.integers(0, width)) if draw(st.booleans()) else 0 for width in widths]
    return rates, widths, draw(st.integers(sum(least), sum(widths))), least


def cost(counts, rates, widths) -> Fraction:
    return sum(
        width * (Fraction(n, width) - Fraction(rate)) ** 2 for n, rate, width in zip(counts, rates, widths, strict=True)
    )


@given(small_problems())
@example(([0.0, 0.0, 0.203125, 0.0], [1, 3, 5, 1], 7, [0, 0, 0, 0]))  # a tie that rounding of the price may break
@settings(deadline=None, max_examples=200)
def test_apportion_is_the_best_of_all_integer_vectors(problem):
    rates, widths, total, least = problem
    vectors = product(*(range(low, width + 1) for low, width in zip(least, widths, strict=True)))
    costs = {counts: cost(counts, rates, widths) for counts in vectors if sum(counts) == total}
    best = min(costs.values())
    # Of equally good vectors, the one that gives ties to the lower rows.
    assert apportioned(*problem) == list(max(counts for counts in costs if costs[counts] == best))


def test_ties_fall_to_the_lower_row():
    assert apportioned([0.5, 0.5, 0.5], [1, 1, 1], 2, [0, 0, 0]) == [1, 1, 0]
    assert apportioned([0.3] * 4, [10] * 4, 14, [0] * 4) == [4, 4, 3, 3]
    assert apportioned([0.25, 0.5, 0.75], [4, 4, 4], 7, [0, 0, 0]) == [2, 2, 3]


def greedily(rates, widths, total, least) -> list[int]:
    """One zero at a time to the row where it costs least, in fractions."""
    counts = list(least)
    price = lambda r: (Fraction(2 * counts[r] + 1) / widths[r] - 2 * Fraction(rates[r]), r)  # noqa: E731
    open_rows = [price(r) for r in range(len(widths)) if counts[r] < widths[r]]
    heapq.heapify(open_rows)
    for _ in range(total - sum(least)):
        _, r = heapq.heappop(open_rows)
        counts[r] += 1
        if counts[r] < widths[r]:
            heapq.heappush(open_rows, price(r))
    return counts


@given(st.integers(0, 10**6), st.sampled_from([64, 1000, 10**9]), st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]))
@settings(deadline=None, max_examples=25)
def test_apportion_is_as_good_as_one_zero_at_a_time(seed, denominator, share):
    generator = torch.Generator().manual_seed(seed)
    widths = torch.randint(1, 60, (30,), generator=generator).tolist()
    rates = (torch.randint(denominator + 1, (30,), generator=generator).double() / denominator).tolist()
    least = [int(width * part) for width, part in zip(widths, torch.rand(30, generator=generator) * 0.3, strict=True)]
    total = sum(least) + round(share * (sum(widths) - sum(least)))
    rates_R = torch.tensor(rates, dtype=torch.float64)
    counts = apportion(rates_R, torch.tensor(widths), total, torch.tensor(least)).tolist()
    assert sum(counts) == total
    assert all(low <= n <= width for low, n, width in zip(least, counts, widths, strict=True))
    best = cost(greedily(rates, widths, total, least), rates, widths)
    assert cost(counts, rates, widths) <= best * (1 + Fraction(1, 10**12))


def test_rates_that_ask_for_the_total_are_met():
    rates_R = torch.tensor([0.2, 0.7, 1.0, 0.0], dtype=torch.float64)
    widths_R = torch.tensor([100, 10, 7, 5])
    assert apportion(rates_R, widths_R, 34, torch.zeros(4, dtype=torch.int64)).tolist() == [20, 7, 7, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_block(dtype):
    """As many rows as a block of 70 billion parameters has, each at its cheapest."""
    generator = torch.Generator().manual_seed(0)
    widths_R = torch.cat([torch.full((60_000,), 8192), torch.full((8192,), 28_672)])
    rates_R = torch.rand(len(widths_R), generator=generator).to(dtype)
    least_R = torch.randint(0, 3000, (len(widths_R),), generator=generator)
    total = 512_345_678
    counts_R = apportion(rates_R, widths_R, total, least_R)
    assert int(counts_R.sum()) == total
    assert (counts_R >= least_R).all()
    assert (counts_R <= widths_R).all()
    shift_R = 2 * (counts_R - rates_R.double() * widths_R)
    given_last_R = ((shift_R - 1) / widths_R)[counts_R > least_R]
    next_R = ((shift_R + 1) / widths_R)[counts_R < widths_R]
    assert given_last_R.max() <= next_R.min() + 1e-12  # no zero is cheaper elsewhere


def test_rows_as_wide_as_a_linear():
    assert apportioned([0.25, 0.75], [10**9, 3 * 10**9], 2_500_000_007, [0, 0]) == [250_000_002, 2_250_000_005]


@pytest.mark.parametrize("total", [2, 13])
def test_impossible_totals(total):
    with pytest.raises(BesaError, match=r"^12 weights that share a budget have 3 zeros already .*\.$") as caught:
        apportioned([0.5, 0.5], [6, 6], total, [1, 2])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("present", "advice"), [(9_999, "ask for a sparsity of at least 0.9999"), (10_000, "--skip")])
def test_advice_can_be_followed(present, advice):
    with pytest.raises(BesaError, match=advice):
        check_room(10_000, 5_000, present)


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -float("inf")])
def test_rates_that_are_not_finite_are_refused(rate):
    with pytest.raises(BesaError, match=r"^Learned pruning rates are NaN or infinite: lower allocation\.travel"):
        apportioned([0.5, rate], [6, 6], 6, [0, 0])


@given(weights=st.integers(1, 10**12), share=st.floats(0, 1))
def test_the_sparsity_that_is_enough(weights, share):
    zeros = round(share * weights)
    enough = enough_for(zeros, weights)
    assert zeros_for(float(enough), weights) >= zeros
    assert (float(enough) - 0.0001) * weights < zeros


@pytest.mark.parametrize("total", [3, 12])
def test_totals_that_are_just_possible(total):
    assert apportioned([0.5, 0.5], [6, 6], total, [1, 2]) == ([1, 2] if total == 3 else [6, 6])


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_cheapest_steps_are_those_of_trying_all(data):
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    prices = st.lists(st.sampled_from([0.0, 1.0, 2.5, 7.0, torch.inf]), min_size=1, max_size=4)
    costs = [data.draw(prices) for _ in sizes]
    total = math.gcd(*sizes) * data.draw(st.integers(0, 12))
    tried = [
        sum(own[n] for own, n in zip(costs, steps, strict=True))
        for steps in product(*(range(len(own)) for own in costs))
        if sum(n * size for n, size in zip(steps, sizes, strict=True)) == total
    ]
    best = min(tried, default=math.inf)
    found = cheapest(costs, sizes, total)
    if math.isinf(best):
        assert found is None
    else:
        assert sum(n * size for n, size in zip(found, sizes, strict=True)) == total
        assert sum(own[n] for own, n in zip(costs, found, strict=True)) == best


@pytest.mark.parametrize(("rows", "columns"), [(30_000, 4096), (43_000, 8192)])
def test_large_sums_are_exact_without_float64(rows, columns, monkeypatch):
    """More zeros than float32 counts, as of a large block on a GPU of Apple."""
    monkeypatch.setattr("besa.methods.apportioning.widest", lambda device: torch.float32)
    rates_R = torch.rand(rows, generator=torch.Generator().manual_seed(0))
    widths_R, total = torch.full((rows,), columns), rows * columns // 2 + 1
    counts_R = apportion(rates_R, widths_R, total, torch.zeros_like(widths_R))
    assert int(counts_R.sum()) == total
