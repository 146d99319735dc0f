import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from besa.data import calibration
from besa.data.calibration import Calibration, sample
from besa.errors import BesaError

LONGEST = 400


def counting_tokenizer() -> PreTrainedTokenizerFast:
    """Every number up to LONGEST is one token, whose id is that number: a token tells its place in the text."""
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(LONGEST)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


COUNTING = counting_tokenizer()


def refusal(call, *arguments) -> str:
    with pytest.raises(BesaError) as caught:
        call(*arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """Texts of the first `length` numbers."""
    folder = tmp_path_factory.mktemp("numbers")

    def text(length: int) -> str:
        path = folder / f"{length}.txt"
        path.write_text(" ".join(map(str, range(length))))
        return str(path)

    return text


@given(
    length=st.integers(1, LONGEST),
    samples=st.integers(1, 20),
    seqlen=st.integers(2, 30),
    seed=st.integers(0, 2**63 - 1),
)
def test_samples_are_windows_of_the_text_that_do_not_overlap(numbers, length, samples, seqlen, seed):
    source = numbers(length)
    if samples * seqlen > length:
        assert f"holds {length:,} tokens" in refusal(sample, source, COUNTING, samples, seqlen, seed)
        return
    tokens = sample(source, COUNTING, samples, seqlen, seed).tokens_NT
    assert tokens.shape == (samples, seqlen)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, tokens[:, :1] + torch.arange(seqlen))  # slices of the text,
    assert len(tokens.unique()) == samples * seqlen  # no token twice


def test_every_token_can_be_drawn(numbers):
    source = numbers(50)
    drawn = torch.cat([sample(source, COUNTING, 2, 8, seed).tokens_NT.flatten() for seed in range(80)])
    assert set(drawn.tolist()) == set(range(50))


def test_the_seed_decides(numbers):
    source = numbers(LONGEST)
    first, again, other = (sample(source, COUNTING, 8, 16, seed) for seed in (3, 3, 4))
    assert torch.equal(first.tokens_NT, again.tokens_NT)
    assert first.sha256 == again.sha256 != other.sha256
    assert (first.samples, first.seqlen, first.seed, first.source) == (8, 16, 3, source)


def test_golden_windows_of_a_seed(numbers):
    """Published runs name their seed: it has to mean the same text tomorrow."""
    assert sample(numbers(100), COUNTING, 3, 4, 7).tokens_NT[:, 0].tolist() == [19, 75, 91]


def test_sha256_is_of_the_little_endian_token_bytes():
    tokens = torch.tensor([[1, 2], [3, 256]])
    # printf '\1\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0\3\0\0\0\0\0\0\0\0\1\0\0\0\0\0\0' | sha256sum
    expected = "86dbe0fe604b010d199bee399b256726b69699ecca83e101039a158d21dbe3e6"
    assert Calibration(tokens, "x", 0).sha256 == expected
    assert Calibration(tokens.T.contiguous().T, "x", 0).sha256 == expected


def test_a_text_that_is_too_short_is_told_in_numbers(numbers):
    assert refusal(sample, numbers(300), COUNTING, 64, 512, 0).endswith(
        "300.txt holds 300 tokens, but 64 sequences of 512 tokens need 32,768: "
        "use a longer text, fewer --samples or a shorter --seqlen."
    )


@pytest.mark.parametrize(("samples", "seqlen", "word"), [(0, 8, "samples"), (-1, 8, "samples"), (4, 1, "--seqlen")])
def test_counts_that_make_no_sense(samples, seqlen, word):
    assert word in refusal(sample, "not even read", COUNTING, samples, seqlen, 0)


# --- a first token, and tokens that are not known ---


def test_every_window_begins_with_the_bos_token(numbers):
    """T tokens in all, of which the first is the same for each."""
    source = numbers(LONGEST)
    drawn = sample(source, COUNTING, 8, 16, 3, bos=7)
    assert drawn.tokens_NT.shape == (8, 16)
    assert drawn.tokens_NT.dtype == torch.int64
    assert drawn.tokens_NT[:, 0].tolist() == [7] * 8
    plain = sample(source, COUNTING, 8, 15, 3)
    assert torch.equal(drawn.tokens_NT[:, 1:], plain.tokens_NT)
    assert (drawn.describe()["bos"], plain.describe()["bos"]) == (True, False)
    assert drawn.sha256 != plain.sha256
    assert "8 sequences of 49 tokens need 392" in refusal(lambda: sample(numbers(391), COUNTING, 8, 50, 3, bos=7))


def test_the_whole_text_is_held_to_the_embeddings(numbers):
    """By luck of the sample a token may not be drawn: it is one of the model's all the same."""
    source = numbers(100)
    assert sample(source, COUNTING, 1, 2, 0, rows=100).samples == 1
    assert "'99' with the id 99, but the model's embeddings have 99 rows only" in refusal(
        lambda: sample(source, COUNTING, 1, 2, 0, rows=99)
    )


# --- texts that are too long to be read whole ---


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A hundred documents of four numbers each, longer than what is held in memory."""
    monkeypatch.setattr(calibration, "WHOLE", 100)
    path = tmp_path / "corpus.jsonl"
    rows = (" ".join(str(4 * place + one) for one in range(4)) for place in range(100))
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


def test_a_long_text_is_drawn_from_everywhere(corpus):
    drawn = Counter()
    for seed in range(60):
        found = sample(corpus, COUNTING, 1, 4, seed)
        assert not found.describe()["whole"]
        assert found.describe()["beginning"] == "0 1 2 3"
        drawn.update(number // 40 for number in found.tokens_NT.flatten().tolist())
    assert len(drawn) == 10  # every tenth of the text
    assert max(drawn.values()) < 3 * 24  # of 240 numbers, about 24 in each


def test_a_long_text_is_drawn_alike_for_a_seed(corpus):
    first, again, other = (sample(corpus, COUNTING, 2, 4, seed).tokens_NT for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sample(corpus, COUNTING, 2, 4, 7).tokens_NT.tolist() == [[27, 328, 329, 330], [227, 84, 85, 86]]


def test_a_long_text_is_drawn_without_repetition(corpus):
    tokens = sample(corpus, COUNTING, 20, 8, 1).tokens_NT
    assert len(tokens.unique()) == 160


def test_of_a_long_text_only_so_much_is_tokenised(corpus, monkeypatch):
    asked = []
    original = calibration.tokenize
    monkeypatch.setattr(
        calibration,
        "tokenize",
        lambda found, *a, **o: asked.append((len(found), o["enough"])) or original(found, *a, **o),
    )
    sample(corpus, COUNTING, 1, 4, 0)
    ((held, enough),) = asked
    assert enough == 16
    assert 7 <= held < 15  # documents of 100 characters, of 7 to 15 each


def test_a_text_of_just_the_size_is_read_whole(corpus, tmp_path):
    path = tmp_path / "small.jsonl"
    path.write_text('{"text": "' + "1 " * 49 + '11"}\n')
    assert sample(str(path), COUNTING, 1, 4, 0).whole
