"""Dialogues made of documents, and questions of embedded texts."""

from datetime import datetime
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from besa.data import dialogues as made
from besa.data.dialogues import ASKED, dialogues, questions
from besa.runtime.chat_template import DATE, dialogue_of, message, prompt_of


def test_first_sentences_are_the_question():
    asked, answer = (
        "It rained. The river rose until it reached the bridge.",
        "Nobody crossed it. Then the sun came again.",
    )
    assert list(dialogues([f"{asked} {answer} That was all."], 500)) == [(asked, f"{answer} That was all.")]


def test_lines_of_code_and_other_scripts_are_sentences_too():
    code = "import os\nimport sys\n\ndef main(arguments):\n" + "    print(arguments)\n" * 5
    ((user, answer),) = dialogues([code], 500)
    assert user == "import os\nimport sys\n\ndef main(arguments):"
    assert answer.startswith("print(arguments)\n")
    ((user, answer),) = dialogues(["雨" * ASKED + "。" + "川" * 60], 500)
    assert (user, answer) == ("雨" * ASKED + "。", "川" * 60)


def test_without_sentences_the_question_is_half_at_most():
    ((user, answer),) = dialogues(["word " * 40], 500)
    assert user == ("word " * 19).strip()
    assert user + " " + answer == ("word " * 40).strip()
    assert list(dialogues(["x" * 200], 500)) == [("x" * 100, "x" * 100)]


def test_what_is_too_short_is_left_out():
    assert list(dialogues(["A city. By a river.", "x" * (2 * ASKED - 1)], 500)) == []


@given(st.text(alphabet="ab. \n。", max_size=900), st.integers(100, 300))
def test_no_word_is_lost_or_changed(document, size):
    def plain(text):
        return "".join(text.split())

    turns = list(dialogues([document], size))
    assert all(len(user) + len(answer) <= size for user, answer in turns)
    assert all(user.strip() and answer.strip() for user, answer in turns)
    rest = plain(document)
    for user, answer in turns:
        found = rest.find(plain(user) + plain(answer))
        assert found >= 0
        rest = rest[found + len(plain(user) + plain(answer)) :]


def test_questions_are_of_all_texts_in_turn_and_the_seed_decides(monkeypatch):
    def documents(name, progress):
        return iter(
            [
                f"This is sentence {i} of the text named {name}, for all to read. " + "It goes on. " * 9
                for i in range(20)
            ]
        )

    monkeypatch.setattr(made, "read_documents", documents)
    asked = list(questions(3))
    assert len(set(asked)) == 100
    names = [question.partition("named ")[2].partition(",")[0] for question in asked]
    assert names == ["c4", "wiki", "code", "technical", "multilingual"] * 20
    assert list(islice(questions(3), 10)) == asked[:10]
    assert list(islice(questions(4), 10)) != asked[:10]


def test_templates_that_name_the_day_give_the_same_text_on_every_day(tiny_tokenizer, monkeypatch):
    template = "{{ strftime_now('%d %b %Y') }}: {% for m in messages %}{{ m.content }} {% endfor %}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    assert dialogue_of(tiny_tokenizer)("Why?", "So.") == "26 Jul 2024: Why? So. "
    asked = [message("user", "Why?")]
    assert tiny_tokenizer.decode(prompt_of(tiny_tokenizer, asked, DATE)[0]).startswith("26 Jul 2024")
    assert tiny_tokenizer.decode(prompt_of(tiny_tokenizer, asked)[0]).startswith(datetime.now().strftime("%d %b %Y"))
