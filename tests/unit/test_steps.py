"""Learning steps on several sequences: who is in a step, and the mean of what they give."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from besa.methods.steps import Mean, one_pass
from besa.system.ranks import Share, together


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 9))
def test_a_pass_has_every_sequence_once(samples, batch, seed):
    places = [3 * place + 1 for place in range(samples)]
    steps = one_pass(places, batch, torch.Generator().manual_seed(seed))
    assert len(steps) == -(-samples // batch)
    assert sorted(place for step in steps for place in step) == places
    assert all(len(step) == min(batch, samples) for step in steps[:-1])


def test_one_sequence_a_step_is_a_permutation_of_all():
    steps = one_pass(range(9), 1, torch.Generator().manual_seed(4))
    assert [[place] for place in torch.randperm(9, generator=torch.Generator().manual_seed(4)).tolist()] == steps


@given(st.integers(1, 6), st.integers(1, 5))
def test_ranks_with_equal_shares_have_equal_work_in_every_step(ranks, rounds):
    samples, batch = ranks * rounds * 2, ranks * 2
    for step in one_pass(range(samples), batch, torch.Generator().manual_seed(0)):
        for number in range(ranks):
            with together(number, ranks):
                assert len(Share.of(samples).own(step)) == 2


def test_the_mean_is_that_of_all_added():
    total = [torch.zeros(2, 3), torch.zeros(())]
    mean = Mean(2)
    mean.add([torch.full((2, 3), 1.0), torch.tensor(5.0)])
    mean.add([torch.full((2, 3), 2.0), torch.tensor(8.0)])
    mean.into(total)
    assert total[0].tolist() == [[1.5] * 3] * 2
    assert float(total[1]) == 6.5


def test_the_mean_of_one_is_left_as_it_is():
    result = torch.tensor([0.1, 0.2])
    mean = Mean(1)
    mean.add([result])
    mean.into([result])
    assert result.tolist() == pytest.approx([0.1, 0.2])


def test_sums_of_float32_are_exact():
    """Thirty-three bits lie between these numbers: more than a float32 has."""
    parts = [torch.tensor([2.0**20]), torch.tensor([2.0**-13]), torch.tensor([-(2.0**20)])]
    mean, result = Mean(3), torch.zeros(1)
    for part in parts:
        mean.add([part])
    mean.into([result])
    assert float(result) == pytest.approx(2.0**-13 / 3, rel=1e-6)
