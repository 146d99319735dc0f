"""Names that users give: which can be paths, and which can be parts of others."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from besa.errors import BesaError
from besa.storage.names import LONGEST, PLAIN, is_path, path_of, pinned, plain, printable


def test_paths_that_can_be(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    for name in ("", ".", "file", "none", "none/below", "file/below", "nowhere", "x" * 255, "a b\n", "é"):
        assert path_of(tmp_path / name) == tmp_path / name
    assert path_of("org/model") == Path("org/model")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "A file name is empty: give one."),
        ("x" * 256, f"'{'x' * 64}…' cannot be used as a file name here (File name too long): give another name."),
        ("a/" * 3000, "(File name too long)"),
        ("nul\0", "'nul\\x00' cannot be used as a file name here (embedded null byte): give another name."),
        ("\udcff", "The name '\\udcff' is not UTF-8: rename that file."),
        ("loop/x", "(Too many levels of symbolic links)"),
    ],
)
def test_paths_that_cannot_be(tmp_path, monkeypatch, name, told):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    with pytest.raises(BesaError) as caught:
        path_of(name)
    assert told in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_path_in_a_closed_folder(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(BesaError, match="Permission denied"):
        path_of(tmp_path / "closed" / "x")


@given(st.text(max_size=200))
def test_reminders_are_plain(text):
    assert PLAIN.fullmatch(f"x{plain(text)}"[:LONGEST])
    assert len(plain(text)) <= LONGEST


def test_control_characters_do_not_reach_a_terminal():
    assert printable("a\x1b[31mé\x07\x9b \u202e") == "a\ufffd[31mé\ufffd\ufffd \ufffd"


@pytest.mark.parametrize("model", ["./a", "../a/b", "~/a", "/a", "a/b/c"])
def test_only_what_may_be_an_id_is_written_with_its_commit(model):
    assert is_path(model)
    assert pinned(model, "c0ffee") == model
    for id in ("a", "a/b"):
        assert not is_path(id)
        assert (pinned(id, "c0ffee"), pinned(id, None)) == (f"{id}@c0ffee", id)
