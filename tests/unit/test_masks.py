"""Ranks against sorting by hand."""

import math

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from besa.counting import masks
from besa.counting.masks import hard_mask, largest, rank
from tests.pretend import DEVICE

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


@given(ranked())
@settings(deadline=None)
def test_another_device_ranks_alike(case):
    assert rank(*(t.to(DEVICE) for t in case)).cpu().tolist() == rank(*case).tolist()


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


@pytest.mark.parametrize("width", [32764, 32768, 36864])
def test_groups_of_the_widest_rows(width):
    """The first of every group comes first, then the second of every group, also where a rank needs more than int16."""
    importance_OI = torch.rand(2, width, generator=torch.Generator().manual_seed(width))
    places_OI = importance_OI.reshape(-1, 4).argsort().argsort().reshape(2, width)
    ranks_OI = rank(importance_OI, torch.ones(2, width), 4)
    assert torch.equal(ranks_OI.long(), places_OI * (width // 4) + torch.arange(width) // 4)


@given(ranked(), st.data())
@settings(deadline=None)
def test_hard_mask_prunes_the_lowest_ranks(case, data):
    ranks_OI = rank(*case)
    rows, width = ranks_OI.shape
    counts = data.draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows))
    kept_OI = hard_mask(ranks_OI, torch.tensor(counts))
    assert kept_OI.dtype == torch.bool
    assert kept_OI.tolist() == [[r >= count for r in row] for row, count in zip(ranks_OI.tolist(), counts, strict=True)]


@given(ranked(), st.sampled_from([None, 1]), st.sampled_from(["cpu", DEVICE]), st.data())
@settings(deadline=None)
def test_the_largest_are_those_that_the_ranks_keep(case, group, device, data):
    """Also where many tie, and of rows that keep all or nothing."""
    importance_OI, w_OI = case
    rows, width = w_OI.shape
    counts_O = torch.tensor(data.draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows)))
    expected_OI = hard_mask(rank(importance_OI, w_OI, group), counts_O)
    kept_OI = largest(importance_OI.to(device), w_OI.to(device), counts_O.to(device), group)
    assert kept_OI.dtype == torch.bool
    assert torch.equal(kept_OI.cpu(), expected_OI)
