"""Coefficients, rates and ranks by the paper's equations, and the gradient against autograd through the dense mask."""

import gc
import math
import weakref
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from besa.counting.masks import rank
from besa.kernels.reference import NEARLY
from besa.methods.allocation import RankedLinear
from besa.methods.allocation.changing import ChangingLinears
from besa.methods.allocation.rates import Rates, candidate_bins, candidate_ranks, candidate_rates, starting_logits


def test_candidate_rates():
    assert candidate_rates(0.01).tolist() == [d / 100 for d in range(101)]
    assert candidate_rates(0.5).tolist() == [0, 0.5, 1]
    assert candidate_rates(0.3).tolist() == [0, 1 / 3, 2 / 3, 1]


@given(intervals=st.integers(2, 200), width=st.integers(1, 40_000))
@example(intervals=100, width=100)  # 0.07 × 100 and 0.29 × 100 are above 7 and below 29 in floating point
@example(intervals=100, width=11_008)
@settings(deadline=None)
def test_candidate_ranks_are_those_of_eq_4(intervals, width):
    """Candidate d prunes rank j exactly where p_d·I > j, with p_d a fraction: ⌈p_d·I⌉ ranks."""
    counts_D = candidate_ranks(candidate_rates(1 / intervals), width)
    assert counts_D.dtype == torch.int64
    assert counts_D.tolist() == [math.ceil(Fraction(d, intervals) * width) for d in range(intervals + 1)]
    if width <= 200:
        assert counts_D.tolist() == [
            sum(Fraction(d, intervals) * width > j for j in range(width)) for d in range(intervals + 1)
        ]


def test_candidate_ranks_of_a_hundred():
    assert candidate_ranks(candidate_rates(0.01), 100).tolist() == list(range(101))


@given(intervals=st.integers(2, 1000), width=st.integers(1, 300))
@settings(deadline=None, max_examples=40)
def test_the_bin_of_a_rank_is_the_first_candidate_that_prunes_it(intervals, width):
    bins_I = candidate_bins(candidate_rates(1 / intervals), width)
    assert bins_I.dtype == torch.int16
    first = [next(d for d in range(intervals + 1) if Fraction(d, intervals) * width > j) for j in range(width)]
    assert bins_I.tolist() == first


@pytest.mark.parametrize("step", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("width", [0.01, 0.1, 0.3, 1.0, 10.0])
def test_learning_starts_at_the_target(step, width):
    rates_D = candidate_rates(step)
    for target in (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.62, 0.7, 0.9, 0.99, 0.999):
        logits_D = torch.tensor(starting_logits(step, target, width))
        assert logits_D.isfinite().all()
        assert float(logits_D.double().softmax(0) @ rates_D) == pytest.approx(target, abs=1e-5)


def test_the_start_is_a_bell_of_the_asked_width():
    rates_D = candidate_rates(0.01)
    for target, width in [(0.5, 0.1), (0.4, 0.05), (0.7, 0.02)]:  # well inside 0 to 1, where nothing is cut off
        beta_D = torch.tensor(starting_logits(0.01, target, width)).double().softmax(0)
        spread = float(beta_D @ (rates_D - target).square()) ** 0.5
        assert spread == pytest.approx(width, rel=1e-2)


def rates(logits_RD, shapes, sparsity=0.5, mask="count") -> Rates:
    """Rates as `Rates.start` makes them for linears of these shapes, but with logits of our own."""
    rows = sum(rows for rows, _ in shapes)
    intervals = logits_RD.shape[1] - 1
    start = Rates.start(
        shapes,
        sparsity,
        per_row=len(logits_RD) == rows,
        step=1 / intervals,
        spread=0.1,
        mask=mask,
        device=torch.device("cpu"),
    )
    assert start.logits_RD.shape == logits_RD.shape
    return Rates(logits_RD, start.rates_D, start.width_R, start.share_R, sparsity, mask)


def counts(found: Rates) -> list[int]:
    beta_RD = found.beta()
    return found.counts(beta_RD, found.alpha(beta_RD)).tolist()


def test_groups_are_rows_or_linears():
    for per_row, widths, shares in [
        (True, [4, 4, 10], [0.5 * 8 / 18] * 2 + [10 / 18]),
        (False, [4, 10], [8 / 18, 10 / 18]),
    ]:
        start = Rates.start(
            [(2, 4), (1, 10)], 0.3, per_row=per_row, step=0.1, spread=0.1, mask="count", device=torch.device("cpu")
        )
        assert start.width_R.tolist() == widths
        assert start.share_R.tolist() == pytest.approx(shares)
        assert start.logits_RD.shape == (len(widths), 11)
        assert start.logits_RD.requires_grad
        assert start.alpha(start.beta()).tolist() == pytest.approx([0.3] * len(widths), abs=1e-4)


@pytest.mark.parametrize(("mask", "pruned"), [("count", 40), ("probability", 80)])
def test_the_two_mask_rules_differ(mask, pruned):
    """With beta = ½ on p = 0 and ½ on p = 0.8, alpha is 0.4."""
    logits_RD = torch.full((1, 101), -1e9)
    logits_RD[0, [0, 80]] = 0
    found = rates(logits_RD, [(2, 100)], 0.4, mask)
    assert found.alpha(found.beta()).tolist() == pytest.approx([0.4])
    assert counts(found) == [pruned]


@pytest.mark.parametrize(
    ("sparsity", "shifted"), [(0.55, [40, 70]), (0.65, [50, 80]), (0.3, [15, 45]), (0.95, [90, 100]), (0.1, [0, 20])]
)
def test_one_shift_moves_every_rate_of_the_count_rule_and_none_of_the_other(sparsity, shifted):
    logits_RD = torch.full((2, 101), -1e9)
    logits_RD[0, 40], logits_RD[1, 70] = 0, 0
    assert counts(rates(logits_RD, [(2, 100)], sparsity)) == shifted
    assert counts(rates(logits_RD, [(2, 100)], sparsity, "probability")) == [40, 70]


@given(st.lists(st.integers(0, 8), min_size=9, max_size=9), st.integers(1, 20))
@example([0, 6, 3, 5, 0, 0, 0, 6, 3], 11)  # alpha × width is a thousandth below 1, which counts as 1
@settings(deadline=None)
def test_counts_follow_the_rules_word_for_word(parts, width):
    """Beta in fractions of a power of two and rates in eighths: float32 is exact, ties and all."""
    assume(sum(parts[1:]))
    parts[0] += 128 - sum(parts)
    beta_D = [part / 128 for part in parts]
    alpha = sum(beta * d / 8 for d, beta in enumerate(beta_D))
    probability_I = [sum(beta for d, beta in enumerate(beta_D) if d / 8 * width > j) for j in range(width)]
    expected = {
        "count": math.floor(alpha * width + NEARLY),
        "probability": sum(probability >= alpha for probability in probability_I),  # eq. 5
    }
    beta_RD = torch.tensor([beta_D])
    for mask, pruned in expected.items():
        found = rates(torch.zeros(1, 9), [(1, width)], alpha, mask)
        assert found.counts(beta_RD, found.alpha(beta_RD)).tolist() == [pruned]


def test_what_is_missed_is_relative():
    found = rates(torch.zeros(3, 3), [(2, 4), (1, 8)], 0.25)
    assert float(found.sparsity_term(torch.tensor([0.5, 0.0, 0.5]))) == pytest.approx((0.375 / 0.25 - 1) ** 2)
    assert float(found.sparsity_term(torch.tensor([0.0, 0.5, 0.25]))) == pytest.approx(0)


# The budget at every step


@given(
    st.integers(0, 10**6),
    st.booleans(),
    st.floats(0.3, 0.7),
    st.floats(0, 0.28),
    st.lists(st.tuples(st.integers(1, 6), st.integers(8, 40)), min_size=1, max_size=4),
)
@settings(deadline=None)
def test_count_masks_meet_the_budget_whatever_was_learned(seed, per_row, sparsity, spread, shapes):
    """Rates up to `spread` to either side of wherever they are, so that none is shifted out of 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    groups = [rows if per_row else 1 for rows, _ in shapes]
    around = 0.3 + 0.4 * float(torch.rand((), generator=generator))
    wanted_R = around + spread * (2 * torch.rand(sum(groups), generator=generator) - 1)
    near_RD = -((candidate_rates(0.01) - wanted_R[:, None]) ** 2) / (2 * 0.02**2)
    found = torch.tensor(counts(rates(near_RD.float(), shapes, sparsity)))
    rows_R = torch.cat([torch.full((n,), rows // n) for n, (rows, _) in zip(groups, shapes, strict=True)])
    missed = int((found * rows_R).sum()) - sparsity * sum(rows * columns for rows, columns in shapes)
    assert abs(missed) <= sum(rows for rows, _ in shapes)


@pytest.mark.parametrize("sparsity", [0.1, 0.9])
def test_count_masks_meet_the_budget_where_rates_are_at_their_ends(sparsity):
    at_ends_RD = torch.full((16, 101), -1e9)
    at_ends_RD[:4, 100], at_ends_RD[4:, 0] = 0, 0
    found = counts(rates(at_ends_RD if sparsity < 0.5 else at_ends_RD.flip(1), [(4, 100)] * 4, sparsity))
    assert abs(sum(found) - 1600 * sparsity) <= 16


# The gradient


def masked_linears(weights, found: Rates, dtype=torch.float32) -> ChangingLinears:
    linears = {name: RankedLinear(w_OI, w_OI.abs(), rank(w_OI.abs(), w_OI)) for name, w_OI in weights.items()}
    return ChangingLinears(linears, found, {}, dtype)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("mask", ["count", "probability"])
def test_gradients_reach_the_logits_as_through_a_dense_mask(per_row, mask):
    """Eqs. 3 to 6 word for word, for two linears of different widths, under a loss that mixes both."""
    generator = torch.Generator().manual_seed(0)
    w_OI, v_OI = torch.randn(6, 25, generator=generator), torch.randn(4, 6, generator=generator)
    x_TI, target_TO = torch.randn(50, 25, generator=generator), torch.randn(50, 4, generator=generator)
    logits_RD = torch.randn(10 if per_row else 2, 11, generator=generator)

    def loss(weights):
        w_OI, v_OI = weights
        y_TO = torch.tanh(x_TI.to(w_OI.dtype) @ w_OI.T) @ v_OI.T
        return (y_TO - target_TO.to(w_OI.dtype)).pow(4).mean().sqrt()

    found = rates(logits_RD.clone().requires_grad_(), [(6, 25), (4, 6)], 0.5, mask)
    linears = masked_linears({"w": w_OI, "v": v_OI}, found)
    beta_RD = found.beta()
    counts_R = found.counts(beta_RD, found.alpha(beta_RD))
    linears.update()
    value = loss(linears.weights.values())
    value.backward()
    assert all(leaf.grad is None for leaf in linears.weights.values())
    linears.backward(torch.tensor(16.0), torch.tensor(0.0))

    reference_RD = logits_RD.double().requires_grad_()
    beta_RD = reference_RD.softmax(dim=1)
    dense = []
    groups = [slice(0, 6), slice(6, 10)] if per_row else [slice(0, 1), slice(1, 2)]
    for at, dense_OI in zip(groups, (w_OI, v_OI), strict=True):
        rows, width = dense_OI.shape
        taken_ID = torch.tensor([[Fraction(d, 10) * width > j for d in range(11)] for j in range(width)]).double()
        ranks_OI = rank(dense_OI.abs(), dense_OI).long()
        soft_OI = 1 - (beta_RD[at] @ taken_ID.T).expand(rows, -1).gather(1, ranks_OI)  # eq. 4
        hard_OI = ranks_OI >= counts_R[at][:, None]
        dense.append(dense_OI.double() * (hard_OI + soft_OI - soft_OI.detach()))
    reference = loss(dense)
    reference.backward()
    assert reference_RD.grad.abs().max() > 1e-3
    torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.logits_RD.grad.double() / 16, reference_RD.grad, rtol=1e-4, atol=1e-8)


def test_masked_weights_in_bfloat16():
    """The weights have the dtype asked for, the gradient of beta is float32."""
    logits_RD = torch.zeros(1, 3, requires_grad=True)
    found = rates(logits_RD, [(1, 4)], 0.25)
    linears = masked_linears({"w": torch.tensor([[1.0, -2.0, 4.0, -8.0]])}, found, torch.bfloat16)
    (leaf_OI,) = linears.weights.values()
    assert leaf_OI.dtype == torch.bfloat16
    linears.update()
    assert leaf_OI.tolist() == [[0, -2, 4, -8]]
    leaf_OI.sum().backward()
    linears.backward(torch.tensor(1.0), torch.tensor(0.0))
    slope_D = torch.tensor([0.0, 1, 5])  # dL/dbeta: nothing, −(1 − 2), −(1 − 2 + 4 − 8)
    assert logits_RD.grad.tolist() == [pytest.approx(((slope_D - slope_D.mean()) / 3).tolist())]
    linears.update()
    assert linears.weights["w"] is leaf_OI


def test_the_penalty_pulls_towards_the_target():
    logits_RD = torch.zeros(1, 3, requires_grad=True)  # alpha is 0.5
    found = rates(logits_RD, [(1, 4)], 0.25)
    linears = masked_linears({"w": torch.ones(1, 4)}, found)
    linears.update()
    (0 * linears.weights["w"]).sum().backward()
    linears.backward(torch.tensor(1.0), torch.tensor(3.0))
    expected_RD = torch.zeros(1, 3, requires_grad=True)
    (3 * ((expected_RD.softmax(1) @ torch.tensor([0.0, 0.5, 1])) / 0.25 - 1).square().sum()).backward()
    torch.testing.assert_close(logits_RD.grad, expected_RD.grad)


def test_weights_go_when_nobody_needs_them():
    """No cycle of references keeps a block's weights until the collector comes by."""
    linears = masked_linears({"w": torch.ones(2, 4)}, rates(torch.zeros(1, 3), [(2, 4)]))
    gone = weakref.ref(linears.weights["w"].untyped_storage())
    watched = weakref.ref(linears.weights["w"])
    gc.disable()
    try:
        del linears
        assert watched() is None
        assert gone() is None
    finally:
        gc.enable()


def test_rates_of_rows():
    logits_RD = torch.full((2, 101), -1e9)
    logits_RD[0, 40], logits_RD[1, 70] = 0, 0
    weights = {"a": torch.ones(1, 3), "b": torch.ones(1, 5)}
    assert {
        name: part.tolist()
        for name, part in masked_linears(weights, rates(logits_RD, [(1, 3), (1, 5)])).row_rates().items()
    } == {
        "a": pytest.approx([0.4]),
        "b": pytest.approx([0.7]),
    }
    weights = {"a": torch.ones(2, 3), "b": torch.ones(3, 5)}
    shared = masked_linears(weights, rates(logits_RD, [(2, 3), (3, 5)])).row_rates()
    assert {name: part.tolist() for name, part in shared.items()} == {
        "a": pytest.approx([0.4] * 2),
        "b": pytest.approx([0.7] * 3),
    }
