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
    assert "1 sequence of 49 tokens needs 49" in refusal(lambda: sample(numbers(48), COUNTING, 1, 50, 3, bos=7))


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


# --- mixtures ---


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """The embedded texts as runs of numbers: c4 from 0, wiki from 80, code from 160, …, the last from 320."""
    starts = {name: 80 * place for place, name in enumerate(calibration.EMBEDDED)}

    def documents(name, progress):
        start = starts[name]
        return iter([" ".join(map(str, range(start, start + lengths.get(name, 80))))])

    lengths: dict[str, int] = {}
    monkeypatch.setattr(calibration, "read_documents", documents)
    return lengths


def by_text(tokens):
    """Sequences of each embedded text."""
    counted = Counter((tokens[:, -1] // 80).tolist())
    return [counted[place] for place in range(5)]


def test_a_mixture_has_its_shares_exactly(texts):
    found = sample("c4:0.5,code:0.3,wiki:0.2", COUNTING, 9, 4, 1)
    assert by_text(found.tokens_NT) == [4, 2, 3, 0, 0]  # 4.5, 1.8 and 2.7: to the largest remainders
    assert found.describe()["parts"] == [
        {"source": "c4", "share": 0.5, "samples": 4, "beginning": shown(0), "whole": True},
        {"source": "code", "share": 0.3, "samples": 3, "beginning": shown(160), "whole": True},
        {"source": "wiki", "share": 0.2, "samples": 2, "beginning": shown(80), "whole": True},
    ]
    assert found.source == "c4:0.5,code:0.3,wiki:0.2"
    assert found.describe()["beginning"] == shown(0)
    again, other = (sample("c4:0.5,code:0.3,wiki:0.2", COUNTING, 9, 4, seed) for seed in (1, 2))
    assert torch.equal(found.tokens_NT, again.tokens_NT)
    assert found.sha256 != other.sha256


def shown(start):
    return " ".join(map(str, range(start, start + 80)))[:80]


def test_golden_sequences_of_a_mixture(texts):
    """As of a text alone: a seed has to mean the same sequences tomorrow."""
    assert sample("mix", COUNTING, 7, 4, 7).tokens_NT[:, 0].tolist() == [67, 115, 147, 227, 387, 307, 35]


def test_sequences_of_a_mixture_are_those_of_its_texts(texts):
    mixed = sample("c4:1,code:1", COUNTING, 8, 4, 5).tokens_NT
    alone = torch.cat([sample(name, COUNTING, 4, 4, 5).tokens_NT for name in ("c4", "code")])
    assert sorted(mixed.tolist()) == sorted(alone.tolist())
    assert mixed.tolist() != alone.tolist()


def test_a_text_alone_has_no_parts(texts):
    assert "parts" not in sample("code", COUNTING, 8, 4, 5).describe()
    assert "chat" not in sample("code", COUNTING, 8, 4, 5).describe()


def test_the_mix_has_equal_shares(texts):
    found = sample("mix", COUNTING, 33, 4, 0)
    assert by_text(found.tokens_NT) == [7, 7, 7, 6, 6]
    assert [part.samples for part in found.parts] == [7, 7, 7, 6, 6]
    assert [part.share for part in found.parts] == [0.2] * 5
    assert by_text(sample("mix", COUNTING, 3, 4, 0).tokens_NT) == [1, 1, 1, 0, 0]


def test_in_the_mix_a_short_text_gives_what_it_has(texts):
    texts["technical"] = 11
    assert by_text(sample("mix", COUNTING, 34, 4, 0).tokens_NT) == [8, 8, 8, 2, 8]
    assert by_text(sample("mix:0.5,self:0.5", COUNTING, 68, 4, 0, author=absent).tokens_NT) == [42, 8, 8, 2, 8]
    assert "The text technical holds 11 tokens, but 3 sequences of 4 tokens need 12" in refusal(
        lambda: sample("c4:0.5,technical:0.5", COUNTING, 6, 4, 0)
    )


@pytest.mark.parametrize("at_most", [False, True])
def test_a_text_shorter_than_one_sequence_gives_none(texts, at_most):
    texts["technical"] = 3
    found = sample("mix", COUNTING, 8, 4, 0, at_most=at_most)
    assert by_text(found.tokens_NT) == [2, 2, 2, 0, 2]
    assert [part.samples for part in found.parts] == [2, 2, 2, 0, 2]


def test_at_most_gives_what_there_is(texts):
    texts["technical"] = 11
    assert by_text(sample("mix", COUNTING, 83, 4, 0, at_most=True).tokens_NT) == [20, 20, 20, 2, 20]
    assert by_text(sample("c4:0.5,technical:0.5", COUNTING, 6, 4, 0, at_most=True).tokens_NT) == [3, 0, 0, 2, 0]
    enough, without = (sample("mix", COUNTING, 34, 4, 0, at_most=few) for few in (True, False))
    assert enough.describe() == without.describe()
    assert "The embedded texts hold 82 sequences of 4 tokens, but 83 are needed" in refusal(
        lambda: sample("mix", COUNTING, 83, 4, 0)
    )


def absent(size):
    """The model's own text, here of the number 1."""
    return torch.ones(size, 4, dtype=torch.int64)


def test_the_model_s_own_text_is_a_part_like_any_other(texts):
    found = sample("self:0.75,wiki:0.25", COUNTING, 8, 4, 0, author=absent)
    assert by_text(found.tokens_NT) == [6, 2, 0, 0, 0]
    assert [(part.source, part.samples, part.beginning) for part in found.parts] == [
        ("self", 6, "1 1 1 1"),
        ("wiki", 2, shown(80)),
    ]
    assert torch.equal(sample("self", COUNTING, 3, 4, 0, author=absent).tokens_NT, absent(3))
    assert "needs a model that writes" in refusal(lambda: sample("self", COUNTING, 3, 4, 0))


# --- dialogues ---


def dialogue(user: str, answer: str) -> str:
    return f"399 {user} 398 {answer} 397"


@pytest.fixture
def dialogues_of_numbers(tmp_path):
    """Twenty documents of sixty tokens of their own each: 300 to 319, thirty times two."""
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " * 60}) + "\n" for i in range(300, 320)))
    return str(path)


def test_every_sequence_begins_with_a_dialogue(dialogues_of_numbers):
    found = sample(dialogues_of_numbers, COUNTING, 6, 70, 1, dialogue=dialogue)
    assert found.tokens_NT.shape == (6, 70)
    assert found.tokens_NT[:, 0].tolist() == [399] * 6
    first = found.tokens_NT[0].tolist()
    at = first.index(398)
    assert len(set(first[1:at])) == len(set(first[1:62]) - {398}) == 1  # one document is the question and its answer
    assert first[62:64] == [397, 399]  # and the next dialogue follows
    assert found.describe()["chat"] is True
    again, other = (sample(dialogues_of_numbers, COUNTING, 6, 70, s, dialogue=dialogue).tokens_NT for s in (1, 2))
    assert torch.equal(again, found.tokens_NT)
    assert not torch.equal(other, found.tokens_NT)


def test_a_template_s_own_bos_token_is_not_doubled(dialogues_of_numbers):
    with_own = sample(dialogues_of_numbers, COUNTING, 6, 70, 1, dialogue=dialogue, bos=399)
    assert with_own.tokens_NT[:, :2].tolist() == [[399, tokens[1]] for tokens in with_own.tokens_NT.tolist()]
    assert 399 not in with_own.tokens_NT[:, 1].tolist()
    added = sample(dialogues_of_numbers, COUNTING, 6, 70, 1, dialogue=dialogue, bos=7)
    assert added.tokens_NT[:, :2].tolist() == [[7, 399]] * 6
    assert added.tokens_NT.shape == (6, 70)


def test_too_few_dialogues_are_told(dialogues_of_numbers):
    assert "holds dialogues for 10 sequences only, but 11 sequences of 70 tokens are needed" in refusal(
        lambda: sample(dialogues_of_numbers, COUNTING, 11, 70, 1, dialogue=dialogue)
    )


def test_tokens_of_dialogues_are_held_to_the_embeddings(dialogues_of_numbers):
    assert "but the model's embeddings have 399 rows only" in refusal(
        lambda: sample(dialogues_of_numbers, COUNTING, 1, 70, 1, dialogue=dialogue, rows=399)
    )
