"""Mixtures of calibration texts: how they are written, exact shares, and the order of their sequences."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from besa.data.embedded import EMBEDDED
from besa.data.mixture import Part, counts, interleaved, levelled, parts_of, texts_of
from besa.errors import BesaError

WEIGHTS = st.lists(st.integers(1, 50), min_size=1, max_size=7)


def read(calibration):
    return [(part.source, part.share) for part in parts_of(calibration)]


def refusal(calibration) -> str:
    with pytest.raises(BesaError) as caught:
        parts_of(calibration)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


@pytest.mark.parametrize("name", ["c4", "mix", "self", "no/such/file.txt", "hf:some/data:1", "hf:some/data:en:0.5", ""])
def test_one_text_is_itself(name):
    assert parts_of(name) == [Part(name, Fraction(1))]


def test_weights_are_normalised_and_exact():
    assert read("c4:0.5,code:0.5") == [("c4", Fraction(1, 2)), ("code", Fraction(1, 2))]
    assert read("self:3, c4:1") == [("self", Fraction(3, 4)), ("c4", Fraction(1, 4))]
    assert read("c4:0.1,wiki:0.2,code:.7") == [
        ("c4", Fraction(1, 10)),
        ("wiki", Fraction(1, 5)),
        ("code", Fraction(7, 10)),
    ]
    assert read("c4:7") == [("c4", Fraction(1))]


def test_names_may_have_commas_and_colons(tmp_path, monkeypatch):
    assert read("a, b:c.txt:1,hf:some/data:en:train:3") == [
        ("a, b:c.txt", Fraction(1, 4)),
        ("hf:some/data:en:train", Fraction(3, 4)),
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4:0.5,code:0.5").write_text("A file of that name.")
    assert read("c4:0.5,code:0.5") == [("c4:0.5,code:0.5", Fraction(1))]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("c4,code", "gives c4,code no weight"),
        ("c4:0.5,code", "gives code no weight"),
        ("c4:0.5,", "gives a text no weight"),
        ("c4:0.5,code:0", "a weight of 0 is not positive"),
        ("c4:-1,code:1", "a weight of -1 is not positive"),
        ("c4:1,code:nan", "a weight of nan is not positive"),
        ("c4:inf,code:1", "a weight of inf is not positive"),
        ("c4:1e999,code:1", "a weight of 1e999 is not positive"),
        ("c4:1,:2", "a weight stands there without a text"),
        ("c4:1,c4:2", "c4 is in it twice"),
        ("mix:1,wiki:1", "wiki is in it twice"),
    ],
)
def test_what_makes_no_mixture_is_told_in_a_sentence(written, said):
    assert said in refusal(written)
    assert written in refusal(written)


def test_weights_of_many_digits_are_refused_without_all_of_them():
    told = refusal(f"c4:0.{'1' * 5000},wiki:1")
    assert told == f"--calibration c4:0.{'1' * 35}…: a weight of 5002 characters is too long."


@given(st.text(max_size=30) | st.text(alphabet="c4:,.0 e-", max_size=20))
def test_anything_is_a_list_of_shares_or_refused(written):
    try:
        parts = parts_of(written)
    except BesaError:
        return
    assert sum(part.share for part in parts) == 1
    assert all(part.share > 0 for part in parts)


def test_the_texts_behind_a_calibration():
    assert texts_of("self") == []
    assert texts_of("self:1,a.txt:1") == ["a.txt"]
    assert texts_of("mix:1,self:1") == list(EMBEDDED)


@given(WEIGHTS, st.integers(0, 500))
def test_shares_are_exact_by_largest_remainder(weights, total):
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    given_ = counts(shares, total)
    assert sum(given_) == total
    rests = [share * total - whole for share, whole in zip(shares, given_, strict=True)]
    assert all(-1 < rest < 1 for rest in rests)
    # Whoever got one more had a remainder at least as large as whoever did not.
    assert max([1 + rest for rest in rests if rest < 0], default=1) >= max([rest for rest in rests if rest >= 0])
    assert min([1 + rest for rest in rests if rest < 0], default=1) >= max([rest for rest in rests if rest >= 0])


def test_of_equal_remainders_the_first_goes_first():
    assert counts([Fraction(1, 3)] * 3, 8) == [3, 3, 2]
    assert counts([Fraction(1, 5)] * 5, 3) == [1, 1, 1, 0, 0]
    assert counts([Fraction(1, 10), Fraction(9, 10)], 5) == [1, 4]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.data())
def test_levels_are_equal_but_for_those_without_room(rooms, data):
    total = data.draw(st.integers(0, sum(rooms)))
    sizes = levelled(rooms, total)
    assert sum(sizes) == total
    assert all(0 <= size <= room for size, room in zip(sizes, rooms, strict=True))
    highest = max(sizes)
    # Only one that is full may be more than one below the highest.
    assert all(size == room or size >= highest - 1 for size, room in zip(sizes, rooms, strict=True))


def test_levels_of_texts_with_room_are_equal_shares():
    assert levelled([100] * 5, 128) == [26, 26, 26, 25, 25] == counts([Fraction(1, 5)] * 5, 128)
    assert levelled([100, 4, 100], 30) == [13, 4, 13]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(sum), st.integers(0, 2**32 - 1))
def test_halves_quarters_and_eighths_have_all_texts_by_their_shares(sizes, seed):
    order = interleaved(sizes, seed)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    assert torch.equal(order, interleaved(sizes, seed))
    text = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[order]
    for step in (1, 2, 4, 8, 16):
        part = text[::step]
        for number, size in enumerate(sizes):
            assert abs(int((part == number).sum()) - len(part) * size / len(text)) <= len(sizes)


@pytest.mark.parametrize("samples", [16, 32, 40, 64, 128])
def test_what_is_held_out_is_of_as_many_texts_as_can_be(samples):
    """One sequence in eight: of 16 two texts, of 40 all five."""
    sizes = counts([Fraction(1, 5)] * 5, samples)
    text = torch.repeat_interleave(torch.arange(5), torch.tensor(sizes))
    for seed in range(10):
        held_out = text[interleaved(sizes, seed)][::8]
        assert len(set(held_out.tolist())) == min(5, len(held_out))


def test_the_order_has_no_period():
    """Every n-th sequence is held out or measured on: it must not always be of one text."""
    order = interleaved([40] * 5, 0)
    for step in (3, 5, 10, 20):
        assert len({int(place) // 40 for place in order[::step]}) > 2
