"""Whole or not at all."""

import errno
from pathlib import Path

import pytest

from besa.checkpoint import writer
from besa.errors import BesaError


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_new_folder_appears_when_all_went_well(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with writer.new_folder(out) as folder:
        (folder / "file").write_text("content")
        assert not out.exists()
    assert (out / "file").read_text() == "content"
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), BesaError("no.")])
def test_new_folder_leaves_nothing_behind_a_failure(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), writer.new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("content")
        raise error
    assert names(tmp_path) == []


def test_new_folder_refuses_what_exists(tmp_path: Path) -> None:
    with pytest.raises(BesaError, match="exists already"), writer.new_folder(tmp_path):
        pytest.fail("entered")


def test_full_disk_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BesaError, match=r"^The disk is full: .*\.$"), writer.new_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_write_file_replaces_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file"
    writer.write_file(path, "first")
    writer.write_file(path, "second")
    assert path.read_text() == "second"

    def fail(self: Path, target: Path) -> Path:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(BesaError, match="cannot be written"):
        writer.write_file(path, "third")
    monkeypatch.undo()
    assert path.read_text() == "second"
    assert names(path.parent) == ["file"]


def test_what_cannot_fit_is_refused_at_once(tmp_path: Path) -> None:
    writer.check_space(tmp_path / "not" / "yet", 1000)
    with pytest.raises(BesaError, match="make room"):
        writer.check_space(tmp_path / "not" / "yet", 10**18)
