"""Ranks against sorting by hand, and the binned gradient against autograd through the dense mask of eq. 4."""

import math
from fractions import Fraction

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from besa import masks
from besa.allocation.besa import candidate_rates
from besa.masks import candidate_ranks, hard_mask, rank, straight_through

IMPORTANCES = [0.0, 1e-45, 1.1754944e-38, 0.5, np.nextafter(np.float32(0.5), np.float32(1)), 1.0, 3e38, math.inf]
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 9))


@st.composite
def ranked(draw):
    """An importance and a weight with many ties and zeros; the weight may be zero where the importance is not."""
    shape = draw(SHAPES)
    importance = draw(arrays.arrays(np.float32, shape, elements=st.sampled_from(IMPORTANCES)))
    weight = draw(arrays.arrays(np.float32, shape, elements=st.sampled_from([0.0, -0.0, 1.0, -2.0])))
    return torch.from_numpy(importance), torch.from_numpy(weight)


def ranks_by_hand(importance_OI, w_OI):
    rows = []
    for importance_I, w_I in zip(importance_OI.tolist(), w_OI.tolist(), strict=True):
        places = [(w_I[i] != 0, importance_I[i] if w_I[i] != 0 else 0, i) for i in range(len(w_I))]
        rows.append([sorted(places).index(place) for place in places])
    return torch.tensor(rows)


@given(ranked())
@settings(deadline=None)
def test_rank_sorts_zeros_then_importance_then_columns(case):
    importance_OI, w_OI = case
    ranks_OI = rank(importance_OI, w_OI)
    assert ranks_OI.tolist() == ranks_by_hand(importance_OI, w_OI).tolist()
    assert (ranks_OI.sort(dim=1).values == torch.arange(w_OI.shape[1])).all()


@given(ranked(), st.integers(1, 30))
@settings(deadline=None)
def test_rank_does_not_depend_on_the_chunk(case, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "CHUNK", chunk)
        assert rank(*case).tolist() == ranks_by_hand(*case).tolist()


def test_rank_takes_what_is_not_contiguous_and_bfloat16():
    importance_OI = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0]], dtype=torch.bfloat16).T
    assert rank(importance_OI, torch.ones(3, 2).T).tolist() == [[2, 0, 1], [0, 2, 1]]


@pytest.mark.parametrize(("width", "dtype"), [(32767, torch.int16), (32768, torch.int32), (65537, torch.int32)])
def test_rank_of_the_widest_rows(width, dtype):
    generator = torch.Generator().manual_seed(width)
    expected_OI = torch.stack([torch.randperm(width, generator=generator), torch.arange(width)])
    importance_OI = torch.stack([expected_OI[0].float() + 1, torch.ones(width)])  # the second row is one long tie
    ranks_OI = rank(importance_OI, torch.ones(2, width))
    assert ranks_OI.dtype == dtype
    assert torch.equal(ranks_OI.long(), expected_OI)
    for count in (0, 1, width - 1, width):
        kept_OI = hard_mask(ranks_OI, torch.tensor([count, width - count]))
        assert kept_OI.sum(dim=1).tolist() == [width - count, count]


@given(ranked(), st.data())
@settings(deadline=None)
def test_hard_mask_prunes_the_lowest_ranks(case, data):
    ranks_OI = rank(*case)
    rows, width = ranks_OI.shape
    counts = data.draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows))
    kept_OI = hard_mask(ranks_OI, torch.tensor(counts))
    assert kept_OI.dtype == torch.bool
    assert kept_OI.tolist() == [[r >= count for r in row] for row, count in zip(ranks_OI.tolist(), counts, strict=True)]


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


def dense_straight_through(beta_RD, w_OI, ranks_OI, counts_O):
    """Eqs. 4 and 6 word for word: the probability of every weight, and a mask that hands its gradient through."""
    width, intervals = w_OI.shape[1], beta_RD.shape[1] - 1
    taken_ID = torch.tensor(
        [[Fraction(d, intervals) * width > j for d in range(intervals + 1)] for j in range(width)], dtype=beta_RD.dtype
    )
    probability_OI = (beta_RD @ taken_ID.T).expand(w_OI.shape).gather(1, ranks_OI.long())
    soft_OI = 1 - probability_OI
    return w_OI * (hard_mask(ranks_OI, counts_O) + soft_OI - soft_OI.detach())


@st.composite
def steps(draw):
    """Everything that one masked weight depends on, in whole numbers so that float32 sums are exact."""
    rows, width = draw(st.tuples(st.integers(1, 5), st.integers(1, 23)))
    whole = arrays.arrays(np.float32, (rows, width), elements=st.integers(-9, 9))
    w_OI, gradient_OI = torch.from_numpy(draw(whole)), torch.from_numpy(draw(whole))
    counts_O = torch.tensor(draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows)))
    groups, intervals = draw(st.sampled_from([1, rows])), draw(st.integers(2, 12))
    ranks_OI = rank(w_OI.abs(), w_OI)
    ranks_D = candidate_ranks(candidate_rates(1 / intervals), width)
    taken_ID = (torch.arange(width)[:, None] < ranks_D).float()
    beta_RD = torch.rand(groups, intervals + 1, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return beta_RD.requires_grad_(), w_OI, ranks_OI, counts_O, taken_ID, gradient_OI


@given(steps())
@settings(deadline=None)
def test_straight_through_gradient_is_that_of_the_dense_mask(step):
    *arguments, gradient_OI = step
    beta_RD, w_OI, ranks_OI, counts_O = arguments[:4]
    masked_OI = straight_through(*arguments)
    assert torch.equal(masked_OI, w_OI * hard_mask(ranks_OI, counts_O))
    (binned_RD,) = torch.autograd.grad(masked_OI, beta_RD, gradient_OI)

    reference_RD = beta_RD.detach().double().requires_grad_()
    dense_OI = dense_straight_through(reference_RD, w_OI.double(), ranks_OI, counts_O)
    (dense_RD,) = torch.autograd.grad(dense_OI, reference_RD, gradient_OI.double())
    assert binned_RD.shape == beta_RD.shape
    assert torch.equal(binned_RD.double(), dense_RD)


@given(steps(), st.integers(1, 30))
@settings(deadline=None)
def test_straight_through_gradient_does_not_depend_on_the_chunk(step, chunk):
    *arguments, gradient_OI = step
    (whole_RD,) = torch.autograd.grad(straight_through(*arguments), arguments[0], gradient_OI)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "CHUNK", chunk)
        (parted_RD,) = torch.autograd.grad(straight_through(*arguments), arguments[0], gradient_OI)
    assert torch.equal(parted_RD, whole_RD)


@pytest.mark.parametrize("groups", [1, 7])
def test_straight_through_under_any_loss(groups):
    generator = torch.Generator().manual_seed(0)
    rows, width, intervals = 7, 30, 20
    w_OI = torch.randn(rows, width, generator=generator)
    x_TI = torch.randn(50, width, generator=generator)
    target_TO = torch.randn(50, rows, generator=generator)
    logits_RD = torch.randn(groups, intervals + 1, generator=generator)
    ranks_OI = rank(w_OI.abs(), w_OI)
    counts_O = torch.randint(width + 1, (rows,), generator=generator)
    taken_ID = (torch.arange(width)[:, None] < candidate_ranks(candidate_rates(1 / intervals), width)).float()

    def loss_and_gradient(dtype, masked):
        free_RD = logits_RD.to(dtype, copy=True).requires_grad_()
        y_TO = torch.tanh(x_TI.to(dtype) @ masked(free_RD.softmax(dim=1), w_OI.to(dtype)).T)
        loss = (y_TO - target_TO.to(dtype)).pow(4).mean().sqrt()
        loss.backward()
        return loss.detach(), free_RD.grad

    binned = loss_and_gradient(
        torch.float32,
        lambda beta_RD, w_OI: straight_through(beta_RD, w_OI, ranks_OI, counts_O, taken_ID),
    )
    dense = loss_and_gradient(
        torch.float64, lambda beta_RD, w_OI: dense_straight_through(beta_RD, w_OI, ranks_OI, counts_O)
    )
    assert dense[1].abs().max() > 1e-3
    torch.testing.assert_close(binned[0].double(), dense[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(binned[1].double(), dense[1], rtol=1e-5, atol=1e-8)


def test_straight_through_in_bfloat16():
    """The masked weight has the weight's dtype, the gradient of beta is float32."""
    w_OI = torch.tensor([[1.0, -2.0, 4.0]], dtype=torch.bfloat16)
    ranks_OI = rank(w_OI.float().abs(), w_OI)
    beta_RD = torch.tensor([[0.5, 0.25, 0.25]], requires_grad=True)
    taken_ID = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    masked_OI = straight_through(beta_RD, w_OI, ranks_OI, torch.tensor([1]), taken_ID)
    assert masked_OI.dtype == torch.bfloat16
    assert masked_OI.tolist() == [[0, -2, 4]]
    masked_OI.sum().backward()
    assert beta_RD.grad.tolist() == [[0, 1, -3]]  # −(1 − 2) and −(1 − 2 + 4)
