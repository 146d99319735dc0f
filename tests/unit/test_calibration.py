import json
import logging
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from besa import calibration
from besa.calibration import Calibration, read_documents, sample, tokenize
from besa.errors import BesaError

LONGEST = 400


def counting_tokenizer() -> PreTrainedTokenizerFast:
    """Every number up to LONGEST is one token, whose id is that number: a token tells its place in the text."""
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(LONGEST)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_tokenizer(**options) -> PreTrainedTokenizerFast:
    """GPT-2's splitting of words, over single bytes; a blank line that stands alone is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, "ĊĊ", "<s>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


COUNTING, BYTES = counting_tokenizer(), byte_tokenizer()


def refusal(call, *arguments) -> str:
    with pytest.raises(BesaError) as caught:
        call(*arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """Texts of the first `length` numbers."""
    folder = tmp_path_factory.mktemp("numbers")

    def text(length: int) -> str:
        path = folder / f"{length}.txt"
        path.write_text(" ".join(map(str, range(length))))
        return str(path)

    return text


# --- sample ---


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


# --- tokenize ---


def ids(text: str) -> list[int]:
    return BYTES(text, add_special_tokens=False)["input_ids"]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_one_document_is_tokenised_as_the_tokenizer_would(document):
    assert tokenize([document], "\n\n", BYTES).tolist() == ids(document)


def test_many_documents_are_tokenised_like_their_joined_text(monkeypatch):
    monkeypatch.setattr(calibration, "TOKENIZER_BATCH", 2)
    documents = ["One here.", "Two\n\nparagraphs.", "Three", "4", "Fünf"]
    stream = tokenize(documents, "\n\n", BYTES)
    assert stream.dtype == torch.int64
    assert stream.tolist() == ids("\n\n".join(documents))
    assert BYTES.convert_tokens_to_ids("ĊĊ") not in stream
    assert tokenize(documents, "", BYTES).tolist() == [token for document in documents for token in ids(document)]


def test_a_long_stream_is_worth_no_warning():
    heard = []
    handler = logging.Handler()
    handler.emit = heard.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        tokenize(["word " * 20], "\n\n", byte_tokenizer(model_max_length=8))
        assert heard == []
        byte_tokenizer(model_max_length=8)("word " * 20)
        assert len(heard) == 1
    finally:
        logging.getLogger("transformers").removeHandler(handler)


# --- read_documents ---


def test_embedded_texts(write, monkeypatch, tmp_path):
    c4 = "menu\n" * 9 + "First.\nSecond\u2028line.\n"
    wiki = '<doc id="1" title="A">\nA\n\nText of A.\n\n</doc>\n<doc id="2" title="B">\nB\n\n</doc>\n'
    embedded = {"c4": tmp_path / "c4.utf8", "wiki": tmp_path / "wiki.utf8"}
    write("c4.utf8", c4)
    write("wiki.utf8", wiki)
    write("c4", "a file of the same name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibration, "fetch", lambda name, progress: embedded[name])
    assert read_documents("c4") == ["First.", "Second\u2028line."]
    assert read_documents("./c4") == ["a file of the same name"]
    assert read_documents("wiki") == ["A\n\nText of A.", "B"]


@pytest.mark.parametrize("name", ["text.txt", "wiki.test.raw", "README"])
def test_a_text_file_is_one_document(write, name):
    assert read_documents(write(name, "\ufeffOne.\r\n\r\nStill one: é.\n")) == ["One.\n\nStill one: é.\n"]


def test_jsonl(write):
    assert read_documents(write("a.jsonl", '{"text": "One."}\n\n{"text": " ", "id": 1}\n{"text": "Two.\\n"}')) == [
        "One.",
        "Two.\n",
    ]


@pytest.mark.parametrize(
    "line", ["{", '{"txt": "x"}', '{"text": 3}', '{"text": null}', "[1]", "7", r'{"text": "\ud800"}']
)
def test_a_bad_line_of_jsonl_is_named(write, line):
    assert refusal(read_documents, write("a.jsonl", f'{{"text": "fine"}}\n{line}\n')).startswith("Line 2 of ")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet(tmp_path, kind):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(["One.", None, "", "Two."], kind), "id": [1, 2, 3, 4]}), path)
    assert read_documents(str(path)) == ["One.", "Two."]


@pytest.mark.parametrize("columns", [{"body": ["One."]}, {"text": [3]}])
def test_parquet_without_a_column_of_text(tmp_path, columns):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    assert 'has no column "text" of strings' in refusal(read_documents, str(path))


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["One." * 1000]}), path, compression="none")
    whole = path.read_bytes()
    for damaged in (b"", b"nonsense", whole[:-100], whole[:4] + b"\xff" * 300 + whole[304:]):
        path.write_bytes(damaged)
        assert "is not a readable parquet file" in refusal(read_documents, str(path))


def test_a_library_that_is_missing(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in (write("a.parquet", b""), "hf:allenai/c4"):
        assert 'pip install "besa-llm[data]"' in refusal(read_documents, source)


def test_texts_that_cannot_be_read(write, tmp_path):
    for missing in ("no-such-text", "", str(tmp_path), "nul\0"):
        assert "embedded one (c4, wiki)" in refusal(read_documents, missing)
    assert "Could not read" in refusal(read_documents, "x" * 5000)
    assert "is not UTF-8 text (byte 3)" in refusal(read_documents, write("latin.txt", "Café\n".encode("latin-1")))
    for blank in (write("a.txt", " \n"), write("a.jsonl", "\n")):
        assert "is empty" in refusal(read_documents, blank)


def test_hub_datasets(monkeypatch):
    calls = []

    def load_dataset(**where):
        calls.append(where)
        return ({"text": json.dumps(i)} for i in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(calibration, "HUB_DOCUMENTS", 3)
    heard = []
    assert read_documents("hf:allenai/c4", lambda *told: heard.append(told)) == ["0", "1", "2"]
    assert heard[-1] == (3, 3, "reading hf:allenai/c4")
    read_documents("hf:Salesforce/wikitext:wikitext-2-raw-v1:test")
    read_documents("hf:allenai/c4:en")
    assert calls == [
        {"path": "allenai/c4", "name": None, "split": "train", "streaming": True},
        {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test", "streaming": True},
        {"path": "allenai/c4", "name": "en", "split": "train", "streaming": True},
    ]
    for nonsense in ("hf:", "hf:a:b:c:d"):
        assert "write hf:<dataset>" in refusal(read_documents, nonsense)


def test_hub_datasets_that_fail(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub.\nMany more lines")

    for load_dataset, reason in [
        (unreachable, "(Couldn't reach the Hub):"),
        (lambda *_, **__: [{"content": "x"}], '(a row has no string "text"):'),
        (lambda *_, **__: [{"text": ["x"]}], '(a row has no string "text"):'),
    ]:
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        assert reason in refusal(read_documents, "hf:some/data")
