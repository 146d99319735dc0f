"""Embedded texts by domain: what is taken of each source, that nothing is calibrated on it, and the mean over all."""

import gzip
import json
import math
import re

import pytest

from besa.data import domains, embedded
from besa.data.assets import ASSETS
from besa.data.documents import read_documents
from besa.data.domains import DOMAINS, held_out
from besa.data.embedded import EMBEDDED, articles_to_measure, code_to_measure
from besa.errors import BesaError
from besa.evaluation import texts
from besa.evaluation.domains import mean_of_domains
from besa.evaluation.result import Evaluation
from besa.evaluation.texts import read_texts, spelled_out
from besa.studies.rows import cell, row
from besa.studies.workspace import Outcome

VALUES = {"web": 2.0, "encyclopedia": 4.0, "code": 8.0, "technical": 16.0, "languages": 32.0}


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Files and questions as the packages have them, of our own making."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        monkeypatch.setattr(domains, "fetch", lambda asked, progress: {name: path}[asked])

    def ask(task, rows):
        monkeypatch.setattr(domains, "questions", lambda asked, progress: {task: rows}[asked])

    write.ask = ask
    return write


def test_articles_of_the_web_have_their_right_endings_and_no_tags(source):
    def asked(origin, context):
        return {"source_id": f"{origin}~1", "ctx": context, "endings": ["wrong.", "right."], "label": "1"}

    howto = "[header] How to rest [title] Sit down. [step] Then it is [substeps] all"
    source.ask("hellaswag", [asked("activitynet", "A man is"), asked("wikihow", howto), asked("wikihow", howto)])
    assert held_out("web") == ["How to rest\nSit down.\nThen it is\nall right."]


def test_paragraphs_of_the_encyclopedia_are_taken_once(source):
    source.ask("boolq", [{"passage": f"A -- {text}"} for text in ("One.", "Two. -- Three.", "One.")])
    assert held_out("encyclopedia") == ["One.", "Two. -- Three."]


def test_of_four_files_of_code_one_is_held_out_and_languages_take_turns(source):
    names = ["python"] * 12 + ["go"] * 8
    files = [f"// ===== BEGIN {name} =====\nfile {i}\n\n  end\n// ===== END =====" for i, name in enumerate(names)]
    source("code", ("mov a, b\n" + "\n\n".join(files) + "\n").encode())
    assert [re.match(r"file (\d+)\n\n  end$", file)[1] for file in held_out("code")] == ["0", "12", "4", "16", "8"]


def test_calibration_takes_the_files_of_code_that_are_not_measured_on():
    files = [f"// ===== BEGIN go =====\nfile {i}\n// ===== END =====" for i in range(9)]
    text = "mov a, b\n" + "\n\n".join(files) + "\n"
    assert [content for _, content in code_to_measure(text)] == ["file 0", "file 4", "file 8"]
    assert list(EMBEDDED["code"](text)) == [f"file {i}" for i in (1, 2, 3, 5, 6, 7)]


def test_calibration_takes_the_languages_between_the_articles_that_are_measured_on(monkeypatch):
    monkeypatch.setattr(embedded, "ARTICLES", ((1, 3), (4, 5)))
    text = "\n".join(["before", "measured", "", "between", "and this", "after", "", "measured", "end"])
    assert articles_to_measure(text) == [["measured", ""], ["and this"]]
    assert list(EMBEDDED["multilingual"](text)) == ["before", "between", "after\n\nend"]


def test_calibration_takes_no_licence_for_a_technical_text(monkeypatch):
    monkeypatch.setattr(embedded, "LICENCES", ((0, 2), (3, 4)))
    assert list(EMBEDDED["technical"]("MIT\n\nA machine\nApache\nis abstract.\n")) == ["", "A machine", "is abstract."]


def test_papers_are_taken_once_with_title_abstract_and_paragraphs(source):
    def line(title, question):
        paper = {"title": title, "abstract": "In short.", "full_text": {"paragraphs": [["A.", " "], [], ["B."]]}}
        return json.dumps({"doc": paper | {"question": question}})

    source("papers", gzip.compress("\n".join([line("T", 1), line("T", 2), line("U", 3)]).encode()))
    assert held_out("technical") == ["T\n\nIn short.\n\nA.\n\nB.", "U\n\nIn short.\n\nA.\n\nB."]


def test_prose_of_the_languages_is_taken_in_turn(source, monkeypatch):
    monkeypatch.setattr(embedded, "ARTICLES", ((0, 4), (4, 6)))
    monkeypatch.setattr(domains, "PASSAGE", 150)
    prose = {letter: letter * 80 for letter in "abcde"}
    lines = ["Heading", prose["a"], prose["b"], prose["c"], prose["d"], "x\t" * 40, prose["e"]]
    source("multilingual", "\n".join(lines).encode())
    assert held_out("languages") == [f"{prose['a']}\n\n{prose['b']}", prose["d"], prose["c"]]


def test_a_domain_ends_where_it_is_long_enough(source, monkeypatch):
    monkeypatch.setattr(domains, "SIZE", 10)
    source.ask("boolq", [{"passage": f"Title -- Passage {i}"} for i in range(9)])
    assert held_out("encyclopedia") == ["Passage 0", "Passage 1"]


def test_domains_stand_for_each_of_them(monkeypatch):
    monkeypatch.setattr(texts, "held_out", lambda name, progress: [f"In the {name}.", "More."])
    monkeypatch.setattr(texts, "read_documents", lambda *_: pytest.fail("a text to calibrate on was read"))
    assert spelled_out(["wiki", "domains", "ptb"]) == ["wiki", *VALUES, "ptb"]
    found = read_texts(["domains"], {})
    assert [text.name for text in found] == list(VALUES)
    assert {(text.source, text.separator) for text in found} == {("embedded", "\n\n")}
    assert read_texts(["code"], {})[0].parts == ["In the code.", "More."]


@pytest.mark.parametrize("name", ["code", "domains"])
def test_files_that_could_be_taken_for_a_domain_are_refused(name):
    with pytest.raises(BesaError, match=rf"^{name}.txt has the name of an embedded text \(--ppl {name}\): rename it.$"):
        read_texts([f"{name}.txt"], {})


@pytest.mark.parametrize("name", ["piqa", "accuracy"])
def test_files_that_could_be_taken_for_an_accuracy_are_refused(name):
    with pytest.raises(BesaError, match=rf"^{name}.txt has the name of an accuracy \({name}\): rename it.$"):
        read_texts([f"{name}.txt"], {})


def test_the_mean_is_geometric_and_of_all_domains_alone():
    assert mean_of_domains(VALUES | {"wiki": 1e9}) == pytest.approx(8.0)
    assert mean_of_domains({name: value for name, value in VALUES.items() if name != "code"}) is None
    assert mean_of_domains(VALUES | {"code": math.inf}) == math.inf


def test_an_evaluation_has_the_mean_in_its_json():
    evaluation = Evaluation(perplexity=VALUES, window=8)
    assert json.loads(evaluation.model_dump_json())["domains"] == pytest.approx(8.0)
    assert Evaluation.model_validate_json(evaluation.model_dump_json()) == evaluation
    assert Evaluation(perplexity={"wiki": 2.0}, window=8).domains is None


def test_a_row_has_the_ratios_to_dense_and_their_geometric_mean():
    def measured(factors):
        values = {name: value * factor for (name, value), factor in zip(VALUES.items(), factors, strict=True)}
        # One for each text, as a workspace keeps them.
        parts = [Evaluation(perplexity={name: value}, window=8) for name, value in (values | {"wiki": 3.0}).items()]
        return Outcome(None, parts)

    reference = measured([1, 1, 1, 1, 1])
    dense = row("dense", [reference])
    pruned = row("besa", [measured([2, 1, 1.5, 1, 1])], dense=reference)
    assert pruned.mean["domains"] == pytest.approx(8 * 3**0.2)
    expected = {"web": 2, "encyclopedia": 1, "code": 1.5, "technical": 1, "languages": 1, "domains": 3**0.2}
    assert pruned.ratios == pytest.approx(expected)
    assert dense.ratios == {}
    assert cell(pruned, "code") == "12.00 (1.500 ×)"
    assert cell(pruned, "wiki") == "3.00"
    endless = pruned.model_copy(update={"mean": {"code": math.inf, "wiki": 1e50}, "ratios": {"wiki": 0.0}})
    assert [cell(endless, name) for name in ("code", "wiki")] == ["∞", "1.00e+50"]


@pytest.mark.slow
def test_the_real_domains_share_nothing_with_what_is_calibrated_on_and_are_long_enough(tmp_path):
    """No stretch of 60 characters of a domain is in a text that calibration takes; `ASSETS` pins what was measured.

    Source files share licences and what every program begins with, so of code it is the files that differ.
    """
    from besa.data.tokens import tokenize
    from besa.models.loading import load_tokenizer
    from besa.models.source import locate

    def stretches(text, step):
        plain = re.sub(r"\s+", " ", text)
        return {plain[i : i + 60] for i in range(0, len(plain) - 59, step)}

    by_text = {name: list(read_documents(name)) for name in EMBEDDED}
    seen = {name: set().union(*(stretches(document, 1) for document in by_text[name])) for name in EMBEDDED}
    calibrated = set().union(*seen.values())
    tokenizer = load_tokenizer(locate("smollm2"))
    windows = {}
    for name in DOMAINS:
        documents = held_out(name)
        measured = set().union(*(stretches(document, 1) for document in documents))
        if name == "code":
            assert not measured & set().union(*(seen[other] for other in EMBEDDED if other != "code"))
            assert len(measured & seen["code"]) < 0.03 * len(measured)
        else:
            assert not measured & calibrated
        assert not set(documents) & {document for text in by_text.values() for document in text}
        assert len(set(documents)) == len(documents)
        windows[name] = len(tokenize(documents, "\n\n", tokenizer)) // 512
    assert windows == {"web": 469, "encyclopedia": 476, "code": 191, "technical": 469, "languages": 59}
    assert {*EMBEDDED, "papers"} <= ASSETS.keys()
