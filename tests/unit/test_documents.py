"""Documents of every source: embedded texts, data sets on the Hub, and files, which test_textfiles.py looks into."""

import json
import sys
from itertools import islice
from types import SimpleNamespace

import pytest

from besa.data import documents
from besa.data.documents import beginning, read_documents
from besa.errors import BesaError


def read(*arguments) -> list[str]:
    return list(read_documents(*arguments))


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


def test_embedded_texts(write, monkeypatch, tmp_path):
    c4 = "menu\n" * 9 + "First.\nSecond\u2028line.\n"
    wiki = '<doc id="1" title="A">\nA\n\nText of A.\n\n</doc>\n<doc id="2" title="B">\nB\n\n</doc>\n'
    embedded = {"c4": tmp_path / "c4.utf8", "wiki": tmp_path / "wiki.utf8"}
    write("c4.utf8", c4)
    write("wiki.utf8", wiki)
    write("c4", "a file of the same name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(documents, "fetch", lambda name, progress: embedded[name])
    assert read("c4") == ["First.", "Second\u2028line."]
    assert read("./c4") == ["a file of the same name"]
    assert read("wiki") == ["A\n\nText of A.", "B"]


def test_a_text_without_words_is_refused_at_once(write):
    for blank in (write("a.txt", " \n"), write("a.jsonl", "\n"), write("a.json", "[]"), write("b.json", "")):
        assert "is empty" in refusal(read_documents, blank)


def test_documents_are_read_when_they_are_asked_for(write):
    """Nobody waits for the end of a long file, nor hears of what is wrong there."""
    found = read_documents(write("a.jsonl", '{"text": " "}\n{"text": "One."}\n{"text": "Two."}\nnonsense'))
    assert list(islice(found, 2)) == ["One.", "Two."]
    assert "Line 4" in refusal(next, found)


def test_the_beginning_of_a_text_and_what_follows():
    words = iter(["aaa", "bb", "c", "dd"])
    assert beginning(words, 4) == ["aaa", "bb"]
    assert beginning(words, 99) == ["c", "dd"]
    assert beginning(words, 4) == []


def test_hub_datasets(monkeypatch):
    calls = []

    def load_dataset(**where):
        calls.append(where)
        return ({"text": json.dumps(i)} for i in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(documents, "HUB_DOCUMENTS", 3)
    heard = []
    assert read("hf:allenai/c4", lambda *told: heard.append(told)) == ["0", "1", "2"]
    assert heard[-1] == (3, 3, "reading hf:allenai/c4")
    read("hf:Salesforce/wikitext:wikitext-2-raw-v1:test")
    read("hf:allenai/c4:en")
    assert calls == [
        {"path": "allenai/c4", "name": None, "split": "train", "streaming": True},
        {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test", "streaming": True},
        {"path": "allenai/c4", "name": "en", "split": "train", "streaming": True},
    ]
    for nonsense in ("hf:", "hf:a:b:c:d", "hf:../..", "hf:/etc", "hf:a/b/c", "hf:./a", "hf:a\0"):
        assert "write hf:<dataset>" in refusal(read, nonsense)


def test_a_folder_here_is_not_taken_for_the_data_set_of_that_name(monkeypatch, tmp_path):
    read_here = SimpleNamespace(load_dataset=lambda **_: [{"text": "from here"}])
    monkeypatch.setitem(sys.modules, "datasets", read_here)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    assert read("hf:some/data") == ["from here"]
    (tmp_path / "some" / "data").mkdir()
    assert "some/data exists here too and would be read in its place" in refusal(read, "hf:some/data")


def test_hub_datasets_that_fail(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub.\nMany more lines")

    for load_dataset, reason in [
        (unreachable, "(Couldn't reach the Hub):"),
        (lambda *_, **__: [{"content": "x"}], '(a row has no string "text"):'),
        (lambda *_, **__: [{"text": ["x"]}], '(a row has no string "text"):'),
    ]:
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        assert reason in refusal(read, "hf:some/data")


def test_hub_datasets_of_long_documents_end_early(monkeypatch):
    monkeypatch.setattr(documents, "WHOLE", 100)
    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(load_dataset=lambda **_: ({"text": "x" * 40} for _ in range(10**9)))
    )
    assert len(read("hf:some/books")) == 3


def test_a_library_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert 'pip install "besa-llm[data]"' in refusal(read, "hf:allenai/c4")
