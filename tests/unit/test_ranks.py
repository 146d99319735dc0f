"""What ranks share: sequences, rows, and the decision that they have decided alike."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from besa.errors import BesaError
from besa.methods.recipe import Recipe
from besa.models.activations import Room
from besa.system import ranks
from besa.system.ranks import Share, alone, together
from tests.pretend_ranks import each_rank


@given(st.integers(1, 200), st.integers(1, 16), st.integers(1, 9))
def test_shares_are_whole_batches_and_all_sequences(total, batch, count):
    shares = []
    for number in range(count):
        with together(number, count):
            shares.append(Share.of(total, batch))
    assert [place for share in shares for place in range(total)[share.places]] == list(range(total))
    assert all(share.first % batch == 0 for share in shares if len(share))
    batches = [-(-len(share) // batch) for share in shares]
    assert max(batches) - min(batches) <= 1


def test_eleven_sequences_in_twos_over_three_ranks():
    lengths = []
    for number in range(3):
        with together(number, 3):
            lengths.append(len(Share.of(11, 2)))
    assert lengths == [4, 4, 3]


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 20))
def test_every_so_manyth_place_of_a_share(first, more, every):
    share = Share(first, first + more, 200)
    assert list(share.every(every)) == [place for place in range(first, first + more) if place % every == 0]
    assert share.own(range(200)) == list(range(more))


@given(st.integers(0, 50), st.integers(1, 9))
def test_every_row_has_one_rank(length, count):
    rows = []
    for number in range(count):
        with together(number, count):
            rows += range(length)[ranks.rows(length)]
    assert rows == list(range(length))


def test_a_single_process_is_given_back_what_it_gives():
    tensor = torch.tensor([1.0])
    assert ranks.total(tensor) is tensor
    assert ranks.gathered(tensor, 1) is tensor
    assert ranks.all_of("a") == ["a"]
    assert ranks.from_first("a") == "a"
    assert ranks.sent() == 0


def test_alone_beside_others():
    with together(1, 3):
        with alone():
            assert (ranks.count(), ranks.number(), ranks.here()) == (1, 0, 3)
        assert (ranks.count(), ranks.number()) == (3, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_bit_that_differs_ends_the_run(dtype):
    def decide():
        w_OI = torch.arange(12.0).view(3, 4).to(dtype)
        if ranks.number() == 2:
            w_OI[1, 2] += 1
        return ranks.check_same("model.layers.3", [torch.ones(2, 2), w_OI])

    with pytest.raises(BesaError, match=r"^Ranks 0 and 2 have pruned model\.layers\.3 differently"):
        each_rank(3, decide)


def test_rows_and_columns_that_change_places_are_seen():
    w_OI = torch.arange(12.0).view(3, 4)
    digests = {ranks._digest(w) for w in (w_OI, w_OI.flip(0), w_OI.flip(1), -w_OI, w_OI.roll(1, 1))}
    assert len(digests) == 5


def test_ranks_of_a_machine_divide_its_memory(monkeypatch):
    monkeypatch.setattr("besa.models.activations.available_bytes", lambda device: 8000)
    with together(0, 8, here=4):
        assert [Room().take(size)[0] for size in (1000, 1001)] == ["host", "file"]
    assert Room().take(4000)[0] == "host"


def test_batches_settle_with_the_number_of_ranks_and_stay_what_they_were():
    recipe = Recipe.load("besa")
    assert (recipe.allocation.batch, recipe.allocation.sequences) == ("auto", 1)
    assert recipe.settled(1, 128, {}).allocation.batch == 1
    assert recipe.settled(8, 128, {}).allocation.batch == 1
    best = Recipe.load("best")
    assert [best.settled(ranks, 128, {}).distill.batch for ranks in (1, 2, 3, 8)] == [1, 2, 3, 4]
    assert best.settled(3, 128, best.settled(2, 128, {}).model_dump()).distill.batch == 2
    chosen = Recipe.load("best", overrides=["distill.batch=5"])
    assert chosen.settled(3, 128, best.settled(2, 128, {}).model_dump()) == chosen
    assert Recipe.load("int4", overrides=["quantization.batch=2"]).settled(2, 128, {}).descent.sequences == 2


@pytest.mark.parametrize("batch", ["0", "-1", "1.5", "true", "many"])
def test_a_batch_is_a_number_of_sequences(batch):
    with pytest.raises(BesaError, match=r"but must be a number of sequences from 1 on, or auto\.$"):
        Recipe.load("besa", overrides=[f"allocation.batch={batch}"])


def settled(samples, *overrides):
    """How much of a sequence a step takes, how many steps there are, and how far they go."""
    allocation = Recipe.load("besa", 0.5, overrides).settled(1, samples, {}).allocation
    return allocation.crop, allocation.steps, allocation.travel


def test_steps_that_would_repeat_few_sequences_take_them_whole():
    assert [settled(samples) for samples in (128, 22)] == [(0.5, 88, 12)] * 2
    assert [settled(samples) for samples in (21, 16, 1)] == [(1, 44, 6)] * 3
    assert settled(16, "allocation.steps=24") == (0.5, 24, 12)
    assert settled(8, "allocation.steps=33", "allocation.travel=5") == (1, 17, 2.5)
    assert settled(43, "allocation.batch=2") == (1, 44, 6)
    for crop in (0.25, 0.5, 1):
        assert settled(16, f"allocation.crop={crop}") == (crop, 88, 12)
    assert Recipe.load("besa", overrides=["allocation.crop=5e-1"]).allocation.crop == 0.5  # a string to YAML 1.1
    whole = Recipe.load("besa").settled(1, 16, {})
    assert whole.settled(1, 16, {}) == whole  # settled once


@pytest.mark.parametrize("crop", ["0", "-1", "1.5", "true", "half", ".nan", "[1]", "null"])
def test_a_crop_is_a_share_of_a_sequence(crop):
    with pytest.raises(BesaError, match=r"but must be a share of a sequence, above 0 and up to 1, or auto\.$"):
        Recipe.load("besa", overrides=[f"allocation.crop={crop}"])
