"""Whole or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from besa.checkpoint import files
from besa.errors import BesaError


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_replacing_appears_when_all_went_well(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file"
    with files.replacing(path) as partial:
        partial.write_text("content")
        assert not path.exists()
    assert path.read_text() == "content"
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), BesaError("no.")])
def test_replacing_leaves_nothing_behind_a_failure(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), files.replacing(tmp_path / "file") as partial:
        partial.write_text("content")
        raise error
    assert names(tmp_path) == []


def test_replacing_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append((tmp_path / "file").exists()), fsync(file)))
    files.write_file(tmp_path / "file", "content")
    assert synced == [False]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_one_sentence(tmp_path: Path, code: int) -> None:
    with pytest.raises(BesaError, match=r"^The disk is full: .*file .*\.$"), files.replacing(tmp_path / "file"):
        raise OSError(code, os.strerror(code))
    assert names(tmp_path) == []


def test_full_disk_is_told_by_safetensors_in_words_only(tmp_path: Path) -> None:
    with pytest.raises(BesaError, match=r"^The disk is full: .*\.$"), files.explained(tmp_path / "out"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(BesaError, match=r"out cannot be written: .*invalid.*\.$"), files.explained(tmp_path / "out"):
        raise SafetensorError("Error while serializing: invalid")


def test_write_file_replaces_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file"
    files.write_file(path, "first")
    files.write_file(path, "second")
    assert path.read_text() == "second"

    def fail(self: Path, target: Path) -> Path:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(BesaError, match="cannot be written"):
        files.write_file(path, "third")
    monkeypatch.undo()
    assert path.read_text() == "second"
    assert names(path.parent) == ["file"]


def test_save_tensors_of_any_layout_and_dtype(tmp_path: Path) -> None:
    stack = torch.arange(24.0).reshape(2, 3, 4)
    tensors = {
        "transposed": stack[0].T,
        "expert.0": stack[0],
        "expert.1": stack[1],
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "number": torch.tensor(7),
    }
    path = tmp_path / "new" / "t.safetensors"
    files.save_tensors(path, tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert names(path.parent) == ["t.safetensors"]


@pytest.fixture
def parts(tmp_path: Path) -> list[tuple[Path, dict[str, torch.Tensor]]]:
    """Three files; the second one's tensors do not fill whole words, the third one is empty."""
    contents = [
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True, False, True])},
        {"c.x": torch.arange(5, dtype=torch.int8), "longer.name": torch.tensor([0.5], dtype=torch.float16)},
        {},
    ]
    made = []
    for number, tensors in enumerate(contents):
        path = tmp_path / f"{number}.safetensors"
        files.save_tensors(path, tensors)
        made.append((path, tensors))
    return made


def test_join_tensors(tmp_path: Path, parts: list[tuple[Path, dict[str, torch.Tensor]]]) -> None:
    out = tmp_path / "joined.safetensors"
    files.join_tensors(out, [path for path, _ in parts])
    expected = {name: tensor for _, tensors in parts for name, tensor in tensors.items()}
    found = load_file(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert files.read_header(out)[1] % 8 == 0
    with safe_open(out, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert {path.name for path, _ in parts} < set(names(tmp_path))


def test_join_tensors_copies_in_pieces(
    tmp_path: Path, parts: list[tuple[Path, dict[str, torch.Tensor]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    files.join_tensors(whole, [path for path, _ in parts])
    monkeypatch.setattr(files, "COPY", 5)
    files.join_tensors(pieces, [path for path, _ in parts])
    assert pieces.read_bytes() == whole.read_bytes()


def test_read_header_tells_where_the_tensors_are(parts: list[tuple[Path, dict[str, torch.Tensor]]]) -> None:
    path, tensors = parts[0]
    entries, start = files.read_header(path)
    assert entries.keys() == tensors.keys()
    assert entries["a"]["shape"] == [2, 3]
    begin, end = entries["a"]["data_offsets"]
    assert path.read_bytes()[start + begin : start + end] == tensors["a"].numpy().tobytes()
    assert json.loads(path.read_bytes()[8:start])["a"] == entries["a"]


def test_what_cannot_fit_is_refused_at_once(tmp_path: Path) -> None:
    files.check_space(tmp_path / "not" / "yet", 1000)
    with pytest.raises(BesaError, match="make room"):
        files.check_space(tmp_path / "not" / "yet", 10**18)
