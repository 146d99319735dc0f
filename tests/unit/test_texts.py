"""What perplexity is measured on: the test sets as the papers join them, and names that mean one thing each."""

import json
import math
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from besa.data import tokens
from besa.errors import BesaError
from besa.evaluation import texts
from besa.evaluation.texts import TEST_SETS, perplexities, read_texts

RAW = " \n = Title = \n \n First line , <unk> .\u2028still \n Second line . \n"
ROWS = ["", " = Title = \n", "", " First line , <unk> .\u2028still \n", " Second line . \n"]


@pytest.fixture
def write(tmp_path):
    def file(name, text):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return file


def one(name, file):
    (text,) = read_texts([name], {name: file})
    return text


def refusal(asked, data=None):
    with pytest.raises(BesaError) as caught:
        read_texts(asked, data or {})
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def whole(text):
    return text.separator.join(text.parts)


def test_wikitext_rows_keep_their_ends_and_are_joined_by_blank_lines(write):
    text = one("wikitext2", write("raw", RAW))
    assert text.parts == ROWS
    assert whole(text) == "\n\n".join(ROWS)
    assert (text.name, text.source, text.tokens) == ("wikitext2", "raw", None)


def test_wikitext_of_a_parquet_file_is_that_of_the_raw_file(write, tmp_path):
    pq.write_table(pa.table({"text": ROWS}), tmp_path / "a.parquet")
    assert one("wikitext2", tmp_path / "a.parquet").parts == one("wikitext2", write("raw", RAW)).parts


def test_ptb_is_sentences_joined_by_spaces(write):
    assert whole(one("ptb", write("ptb.txt", " no it was n't \n\n he said <unk> \n"))) == "no it was n't he said <unk>"


def test_c4_is_its_first_documents_and_tokens(write, tiny_tokenizer):
    documents = [f"Document {place}." for place in range(1105)]
    text = one("c4", write("val.jsonl", "\n".join(json.dumps({"text": d}) for d in documents)))
    assert whole(text) == " ".join(documents[:1100])
    assert text.tokens == 256 * 2048
    expected = tiny_tokenizer(" ".join(documents[:1100]), add_special_tokens=False, verbose=False)["input_ids"]
    tokens_L, size = text.tokenized(tiny_tokenizer)
    assert tokens_L.tolist() == expected  # one string, not one by one
    assert size == len(" ".join(documents[:1100]))


def test_any_other_text_is_documents_joined_by_blank_lines(write, tiny_tokenizer):
    (text,) = read_texts([write("mine.jsonl", '{"text": "One."}\n{"text": "Zwölf."}')], {})
    assert (text.name, whole(text), text.beginning) == ("mine", "One.\n\nZwölf.", "One.")
    tokens_L, size = text.tokenized(tiny_tokenizer, enough=1)
    assert tokens_L.tolist() == tiny_tokenizer("One.\n\nZwölf.")["input_ids"]
    assert size == 13


@pytest.mark.parametrize("name", ["c4-validation.json", "c4.JSONL", "c4.json.gz", "c4.txt"])
def test_documents_of_a_set_are_told_by_the_content_of_its_file(write, name):
    text = one("c4", write(name, json.dumps([{"text": 'First "one".'}, {"text": "Two."}])))
    assert (whole(text), text.beginning) == ('First "one". Two.', 'First "one".')


def test_of_a_long_text_no_more_is_read_than_its_windows_need(write, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(texts, "WHOLE", 1000)
    monkeypatch.setattr(tokens, "BATCH_DOCUMENTS", 4)
    documents = [f"Document {place}: {'the cité ' * (place % 5)}" for place in range(999)]
    file = write("long.jsonl", "\n".join(json.dumps({"text": document}) for document in documents))
    told = []
    (text,) = read_texts([file], {})
    found, size = text.tokenized(tiny_tokenizer, enough=200, progress=lambda *news: told.append(news))
    assert len(text.parts) < 100
    assert 200 <= len(found) < 400
    read = next(n for n in range(0, 999, 4) if tokens.tokenize(documents[:n], "\n\n", tiny_tokenizer).equal(found))
    assert size == len("\n\n".join(documents[:read]).encode())
    assert told[-1][1:] == (200, "tokenising")
    (text,) = read_texts([file], {})
    found, size = text.tokenized(tiny_tokenizer)
    assert found.equal(tokens.tokenize(documents, "\n\n", tiny_tokenizer))
    assert size == len("\n\n".join(documents).encode())


def test_bits_per_byte_are_of_the_tokens_that_are_measured(write, tiny_llama, tiny_tokenizer):
    """A text whose beginning has shorter tokens than the rest."""
    words = "a b c d e f g h " * 20 + "the model of the weights is learned from the words " * 20
    (text,) = read_texts([write("uneven.txt", words)], {})
    ((_, found),) = perplexities(tiny_llama, tiny_tokenizer, [text], [20], max_windows=3)[20].items()
    measured = tiny_tokenizer.decode(tiny_tokenizer(words)["input_ids"][:60])
    assert words.startswith(measured)
    assert found.bits_per_byte == pytest.approx(math.log2(found.perplexity) * 60 / len(measured.encode()), rel=1e-9)
    assert len(words) / len(tiny_tokenizer(words)["input_ids"]) > 1.2 * len(measured) / 60


def test_sets_come_from_the_hub_unless_there_is_a_file(write, monkeypatch):
    calls = []

    def load_dataset(**where):
        calls.append(where)
        column = "sentence" if "ptb" in where["path"] else "text"
        return ({column: f"{where['path']} {i}"} for i in range(3 if "c4" not in where["path"] else 5000))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = read_texts(["ptb", "c4", "wikitext2"], {"wikitext2": write("raw", RAW)})
    assert [len(text.parts) for text in found] == [3, 1100, len(ROWS)]
    assert [text.source for text in found] == ["hub", "hub", "raw"]
    assert [call["split"] for call in calls] == ["test", "validation"]
    assert calls == [{**TEST_SETS[name].hub, "streaming": True} for name in ("ptb", "c4")]


def test_a_set_that_cannot_be_had_says_how(monkeypatch):
    def unreachable(**_):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=unreachable))
    assert refusal(["c4"]).endswith("or give a local file (--data c4=FILE).")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert 'pip install "besa-llm[data]", or give a local file (--data ptb=FILE).' in refusal(["ptb"])


def test_the_embedded_c4_is_not_the_test_set(monkeypatch):
    """`--ppl c4` never reads what models are calibrated on."""
    monkeypatch.setattr(texts, "read_documents", lambda *_: pytest.fail("the embedded text was read"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    refusal(["c4"])


def test_names_that_could_be_taken_for_others_are_refused(write):
    file = write("c4.jsonl", '{"text": "One."}')
    assert f"--ppl c4 --data c4={file}" in refusal([file])
    assert "--ppl c4 --data c4=c4.json.gz" in refusal(["c4.json.gz"])
    assert "Two texts have the name wikitext2" in refusal(["wikitext2", write("wikitext2.txt", "x")])
    assert "Two texts have the name x" in refusal([write("x.txt", "x"), write("x.jsonl", '{"text": "x"}')])
    assert "no test set c5" in refusal(["wiki"], {"c5": file})
    assert "add --ppl ptb" in refusal(["c4"], {"ptb": file})
    assert "must keep documents apart" in refusal(["c4"], {"c4": write("c4.txt", "x")})
    assert "is empty" in refusal(["ptb"], {"ptb": write("blank.txt", " \n")})
    assert "There is no text" in refusal(["ptb"], {"ptb": "missing.txt"})


def test_a_text_that_is_too_short_is_named_before_any_is_measured(write, tiny_llama, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(texts, "perplexity", lambda *_: pytest.fail("one was measured"))
    parts = read_texts([write("long.txt", "Many words. " * 200), write("short.txt", "Few words.")], {})
    with pytest.raises(BesaError, match=r"^The text short has \d tokens, fewer than one window of 64: use a smaller"):
        perplexities(tiny_llama, tiny_tokenizer, parts, [4, 64])
