"""Whole or not at all."""

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from besa.errors import BesaError
from besa.storage import tensors as tensor_files
from besa.storage import writing as files


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


def test_errors_of_safetensors_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BesaError, match=r"out cannot be written: .*invalid.*\.$"), files.explained(tmp_path / "out"):
        raise SafetensorError("Error while deserializing: invalid")


def test_a_file_in_the_way_is_told_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    told = re.escape(f"{file / 'out'} cannot be written: Not a directory; choose another name.")
    with pytest.raises(BesaError, match=f"^{told}$"), files.appearing(file / "out"):
        pass
    told = re.escape(f"{file} cannot be written: File exists; choose another name.")
    with pytest.raises(BesaError, match=f"^{told}$"), files.claimed(file, file):
        pass


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
        "strided number": stack[0, :1, :1],
        "nothing": stack[:0],
    }
    path = tmp_path / "new" / "t.safetensors"
    tensor_files.save_tensors(path, tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert names(path.parent) == ["t.safetensors"]


NUMBERS = torch.arange(0, 252, 7, dtype=torch.uint8)  # 36 bytes that are numbers in any dtype


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {
            f"of.{str(dtype)[6:]}": (NUMBERS[:32].view(4, 8) & (1 if dtype == torch.bool else 255)).view(dtype)
            for dtype in tensor_files.NAMES
        },
        {
            "b": torch.tensor(7),
            "a": torch.tensor(True),
            "é 𝄞": torch.tensor(0.5),
            'qu"o\\te\n\x01\x7f/': torch.tensor(-1),
        },
        {
            "none": torch.zeros(0),
            "rows": torch.zeros(0, 3, dtype=torch.bool),
            "columns": torch.zeros(2, 0, dtype=torch.int8),
        },
        {"a": torch.nn.Parameter(torch.ones(3)), "byte": torch.ones(3, dtype=torch.uint8), "A": torch.ones(1)},
    ],
    ids=["nothing", "dtypes", "numbers", "empty", "order"],
)
def test_files_have_the_bytes_of_safetensors_own(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensor_files.save_tensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_metadata_of_a_file(tmp_path: Path) -> None:
    about = {"a": "1", "é": 'quo"te'}
    tensor_files.save_tensors(tmp_path / "ours", {"t": torch.ones(3)}, about)
    save_file({"t": torch.ones(3)}, tmp_path / "theirs", {"format": "pt", **about})  # in any order
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size
    with safe_open(tmp_path / "ours", framework="pt") as file:
        assert file.metadata() == {"format": "pt", **about}


def test_tensors_that_share_memory_are_each_written(tmp_path: Path) -> None:
    both = torch.arange(6.0).reshape(2, 3)
    tensors = {"one": both, "same": both, "turned": both.T, "part": both[:, 1], "last": both[1, 1:]}
    tensor_files.save_tensors(tmp_path / "t", tensors)
    found = load_file(tmp_path / "t")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }


def test_one_tensor_at_a_time_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, contiguous = [], torch.Tensor.contiguous

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        written.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
        return contiguous(tensor)

    monkeypatch.setattr(torch.Tensor, "contiguous", copied)
    tensors = {name: torch.ones(1000, 1000).T for name in "abc"}
    tensor_files.save_tensors(tmp_path / "t", tensors)
    assert [size // 4_000_000 for size in written] == [0, 1, 2]


def test_numbers_that_the_format_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BesaError, match=r"t cannot be written: safetensors files have no torch\.complex128, as x is\.$"
    ):
        tensor_files.save_tensors(tmp_path / "t", {"x": torch.zeros(2, dtype=torch.complex128)})
    assert names(tmp_path) == []


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
        tensor_files.save_tensors(path, tensors)
        made.append((path, tensors))
    return made


def test_join_tensors(tmp_path: Path, parts: list[tuple[Path, dict[str, torch.Tensor]]]) -> None:
    out = tmp_path / "joined.safetensors"
    tensor_files.join_tensors(out, [path for path, _ in parts])
    expected = {name: tensor for _, tensors in parts for name, tensor in tensors.items()}
    found = load_file(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert tensor_files.read_header(out)[1] % 8 == 0
    with safe_open(out, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert {path.name for path, _ in parts} < set(names(tmp_path))


def test_join_tensors_copies_in_pieces(
    tmp_path: Path, parts: list[tuple[Path, dict[str, torch.Tensor]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    tensor_files.join_tensors(whole, [path for path, _ in parts])
    monkeypatch.setattr(tensor_files, "COPY", 5)
    tensor_files.join_tensors(pieces, [path for path, _ in parts])
    assert pieces.read_bytes() == whole.read_bytes()


def test_read_header_tells_where_the_tensors_are(parts: list[tuple[Path, dict[str, torch.Tensor]]]) -> None:
    path, tensors = parts[0]
    entries, start = tensor_files.read_header(path)
    assert entries.keys() == tensors.keys()
    assert entries["a"]["shape"] == [2, 3]
    begin, end = entries["a"]["data_offsets"]
    assert path.read_bytes()[start + begin : start + end] == tensors["a"].numpy().tobytes()
    assert json.loads(path.read_bytes()[8:start])["a"] == entries["a"]


def test_what_cannot_fit_is_refused_at_once(tmp_path: Path) -> None:
    files.check_space(tmp_path / "not" / "yet", 1000)
    with pytest.raises(BesaError, match="make room"):
        files.check_space(tmp_path / "not" / "yet", 10**18)


def test_small_sizes_are_no_zeros_in_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_234))
    with pytest.raises(BesaError, match=r"needs 2\.50 MB but only 1\.23 kB are free there: make room first\.$"):
        files.check_space(tmp_path, 2_500_000)
    with pytest.raises(BesaError, match=r"needs 7\.00 GB but"):
        files.check_space(tmp_path, 7 * 10**9)


def test_a_folder_appears_when_it_is_full(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with files.appearing(out) as folder:
        (folder / "file").write_text("content")
        assert not out.exists()
    assert names(out) == ["file"]
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), BesaError("no.")])
def test_a_folder_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), files.appearing(tmp_path / "out") as folder:
        (folder / "file").write_text("content")
        raise error
    assert names(tmp_path) == []


def test_a_folder_that_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(BesaError, match="exists already"), files.appearing(tmp_path / "out"):
        pytest.fail("it was begun")
    assert names(tmp_path) == ["out"]


def test_a_name_that_no_file_can_have_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BesaError, match=r"^[^\n]*\(File name too long\): give another name\.$"):
        files.check_absent(tmp_path / ("x" * 300))
    with pytest.raises(BesaError, match="too long"), files.appearing(tmp_path / ("x" * 300)):
        pytest.fail("it was begun")


def test_one_process_at_a_time_makes_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with files.appearing(out) as folder:
        (folder / "file").write_text("mine")
        with pytest.raises(BesaError, match=f"^Another besa process is writing {out}: "), files.appearing(out):
            pytest.fail("it was begun")
    assert (out / "file").read_text() == "mine"


def killed(action: Callable[[], object]) -> None:
    """A child that acts until it kills itself."""
    child = os.fork()
    if child == 0:
        action()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_what_a_killed_process_left_of_a_folder_goes(tmp_path: Path) -> None:
    def half() -> None:
        with files.appearing(tmp_path / "out") as folder:
            (folder / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    killed(half)
    assert [path.name for path in tmp_path.rglob("half")] == ["half"]
    with files.appearing(tmp_path / "out") as folder:
        (folder / "file").write_text("content")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["file"]


def test_what_a_killed_process_left_of_a_file_goes(tmp_path: Path) -> None:
    def half() -> None:
        with files.replacing(tmp_path / "file[1]") as partial:
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    killed(half)
    assert len(names(tmp_path)) == 1
    files.write_file(tmp_path / "other", "content")
    assert len(names(tmp_path)) == 2
    with files.replacing(tmp_path / "file[1]"):  # one that lives keeps its own
        left = names(tmp_path)
        (own,) = (name for name in left if name.startswith(".file"))
        assert f".{os.getpid()}." in own
        child = os.fork()
        if child == 0:
            files.write_file(tmp_path / "file[1]", "another's")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert (tmp_path / own).exists()
        (tmp_path / own).write_text("content")
    assert sorted(names(tmp_path)) == ["file[1]", "other"]
    assert (tmp_path / "file[1]").read_text() == "content"


def test_no_other_process_takes_a_file_of_tensors_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one writes the same file just before it gets its name."""
    path, fsync = tmp_path / "t.safetensors", os.fsync

    def slow(file: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        child = os.fork()
        if child == 0:
            tensor_files.save_tensors(path, {"other": torch.zeros(2)})
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert set(load_file(path)) == {"other"}
        fsync(file)

    monkeypatch.setattr(os, "fsync", slow)
    tensor_files.save_tensors(path, {"mine": torch.zeros(3)})
    assert set(load_file(path)) == {"mine"}
    assert names(tmp_path) == ["t.safetensors"]


def test_what_a_killed_process_left_of_a_file_of_tensors_goes(tmp_path: Path) -> None:
    class Deadly(torch.Tensor):
        def contiguous(self) -> torch.Tensor:
            os.kill(os.getpid(), signal.SIGKILL)
            return self

    path = tmp_path / "t.safetensors"
    tensors = {"a": torch.zeros(100_000), "b": torch.zeros(3).as_subclass(Deadly)}
    killed(lambda: tensor_files.save_tensors(path, tensors))
    assert [name.endswith(".partial") for name in names(tmp_path)] == [True]
    tensor_files.save_tensors(path, {})
    assert names(tmp_path) == ["t.safetensors"]


def test_processes_that_write_the_same_file_at_once(tmp_path: Path) -> None:
    """Each time it is the whole text of one of them, and nothing is left in the end."""
    texts = [str(number) * 10_000 for number in range(3)]
    children = []
    for text in texts:
        child = os.fork()
        if child == 0:
            try:
                for _ in range(60):
                    files.write_file(tmp_path / "file", text)
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    running = True
    while running:
        running = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        if (tmp_path / "file").exists():
            assert (tmp_path / "file").read_text() in texts
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", ["link", "link to nothing", "mount"])
def test_a_folder_that_nothing_can_be_renamed_from_is_not_claimed(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, elsewhere = tmp_path / "out.partial", tmp_path / "elsewhere"
    if kind == "mount":
        monkeypatch.setattr(os.path, "ismount", lambda path: path == work)
        work.mkdir()
    else:
        work.symlink_to(elsewhere)
    if kind == "link":
        elsewhere.mkdir()
    refused = pytest.raises(BesaError, match=r"out\.partial is a link or a file system of its own, from which .*\.$")
    with refused, files.claimed(work, tmp_path / "out"):
        pytest.fail("it was begun")
    assert [path.name for path in tmp_path.rglob("*.lock")] == []
    with files.claimed(work, work) if kind != "link to nothing" else nullcontext():  # nothing is renamed from there
        pass


def test_a_folder_with_a_pipe_is_not_claimed(tmp_path: Path) -> None:
    """Nobody would ever write into it."""
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(BesaError, match=r"run.json is no regular file"), files.claimed(tmp_path, tmp_path / "out"):
        pass
