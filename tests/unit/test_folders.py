"""Folders that are read: no pipe may be in them, and files may go while they are looked at."""

import os
from pathlib import Path

import pytest

from besa.errors import BesaError
from besa.storage.folders import check_regular


def test_a_pipe_is_refused_and_so_is_a_link_to_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "pipe")
    for folder, name in ((tmp_path, "pipe"), (tmp_path / "folder", "link")):
        with pytest.raises(BesaError, match=f"{name} is no regular file: remove it"):
            check_regular(folder)


def test_files_folders_and_links_to_nothing_are_no_pipes(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    check_regular(tmp_path)


def test_a_file_that_another_run_removes_meanwhile_is_no_pipe(tmp_path, monkeypatch):
    (tmp_path / ".block-00002.json.partial").touch()
    stat = Path.stat

    def once(path, **how):
        found = stat(path, **how)
        if path.suffix == ".partial":
            path.unlink()
        return found

    monkeypatch.setattr(Path, "stat", once)
    check_regular(tmp_path)
