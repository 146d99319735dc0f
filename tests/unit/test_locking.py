"""Locks on files, also as Windows has them."""

import errno
import os
import sys
from pathlib import Path

import pytest

from besa.errors import BesaError
from besa.storage import locking
from besa.storage import writing as files
from tests.other_system import Msvcrt


@pytest.fixture(params=["here", "windows"])
def system(request, monkeypatch):
    if request.param == "windows":
        monkeypatch.setattr(locking, "WINDOWS", True)
        monkeypatch.setitem(sys.modules, "msvcrt", Msvcrt())
        monkeypatch.setitem(sys.modules, "fcntl", None)


@pytest.mark.usefixtures("system")
def test_one_at_a_time(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as mine, (tmp_path / "lock").open("w") as yours:
        assert locking.locked(mine) and not locking.locked(yours)
        mine.close()
        assert locking.locked(yours)


@pytest.mark.usefixtures("system")
def test_a_file_appears_whole_and_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / ".file.1.partial").write_text("of a killed process")
    files.write_file(tmp_path / "file", "text")
    files.write_file(tmp_path / "file", "another text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "another text"


@pytest.mark.usefixtures("system")
def test_what_another_process_writes_is_left(tmp_path: Path) -> None:
    other = tmp_path / ".file.1.partial"
    with other.open("wb") as held:
        assert locking.locked(held)
        files.write_file(tmp_path / "file", "text")
        assert other.exists()


@pytest.mark.usefixtures("system")
def test_a_folder_appears_and_its_claim_is_gone(tmp_path: Path) -> None:
    with files.appearing(tmp_path / "out") as folder:
        (folder / "file").write_text("text")
        with pytest.raises(BesaError, match=r"^Another besa process is writing"), files.appearing(tmp_path / "out"):
            pytest.fail("it was begun")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_system_without_locks_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not taken for another process that would have to be waited for; one file can be written all the same."""

    def flock(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    for made in (files.appearing, files.taken):
        with pytest.raises(BesaError, match=r"has no locks .*: choose a place on another"), made(tmp_path / "out"):
            pytest.fail("it was begun")
    (tmp_path / ".file.1.partial").write_text("of a killed process")
    files.write_file(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.usefixtures("system")
def test_a_piece_of_work_is_taken_once(tmp_path: Path) -> None:
    with files.taken(tmp_path / "lock") as mine, files.taken(tmp_path / "lock") as yours:
        assert mine and not yours
    assert not (tmp_path / "lock").exists()
