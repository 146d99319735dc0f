"""Runs that are stopped, by whatever, and go on: the result is bit for bit that of a run that was not stopped."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from besa import BesaError, Recipe, cli, compress, pack
from besa.api import Compressed, compressing
from besa.checkpoint import writer
from besa.errors import Interrupted, Notice
from besa.pruning import measuring
from besa.storage import tensors as files
from besa.storage.journal import Journal
from besa.storage.weights import WeightFiles
from besa.storage.writing import replacing
from tests.calling import called
from tests.slowly import some_slow

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "assets" / "tiny-llama"
TEXT = str(TINY / "calibration.txt")
BLOCKS = 8
STOPPED = (KeyboardInterrupt, Interrupted)

WITHOUT_THREADS = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def prune(out: Path, **changes: Any) -> Compressed:
    settings = {"recipe": "besa", "samples": 8, "seqlen": 32, "dtype": "float32"} | changes
    model, calibration = settings.pop("model", TINY), settings.pop("calibration", TEXT)
    return compress(model, settings.pop("recipe"), calibration, out=out, **settings)


def stopped_after(blocks: int) -> Callable[[int, int, str], None]:
    """A progress that stops the run as Ctrl-C would, once so many blocks are done."""

    def progress(done: int, _: int, state: str) -> None:
        if done == blocks and state != "embeddings":
            raise KeyboardInterrupt

    return progress


def stopped_once_measured(out: Path) -> Callable[[int, int, str], None]:
    """A progress that stops the run as Ctrl-C would, after what precedes the first block."""

    def progress(*_: object) -> None:
        if (partial_of(out) / "targets.json").exists():
            raise KeyboardInterrupt

    return progress


def partial_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def blocks_of(out: Path) -> list[dict[str, Any]]:
    """What the record says of each block, but for the time it took."""
    blocks: list[dict[str, Any]] = json.loads((out / "besa_run.json").read_text())["blocks"]
    return [{key: value for key, value in block.items() if key not in ("seconds", "phases")} for block in blocks]


def assert_same(out: Path, whole: Path) -> None:
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert blocks_of(out) == blocks_of(whole)
    assert not partial_of(out).exists()


def sentence(refusal: "pytest.ExceptionInfo[BesaError]") -> str:
    text = str(refusal.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a run that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert prune(out).record.restored_blocks == 0
    return out


@pytest.fixture(scope="module")
def five_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an out.partial of five finished blocks; tests work on copies."""
    out = tmp_path_factory.mktemp("five") / "out"
    with pytest.raises(STOPPED) as interruption:
        prune(out, progress=stopped_after(5))
    assert (
        str(interruption.value) == f"interrupted; 5 finished blocks are kept in {partial_of(out)}: go on with --resume."
    )
    return out.parent


@pytest.fixture
def begun(five_blocks: Path, tmp_path: Path) -> Path:
    """An OUT whose run was stopped after five blocks."""
    shutil.copytree(five_blocks, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


def start(*arguments: object) -> subprocess.Popen[str]:
    """The command line in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "besa", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=WITHOUT_THREADS,
        start_new_session=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Until the running process has written `path`."""
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_again_and_again(whole: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("kill_and_resume.py"), TINY, TEXT, tmp_path, "0", "20"],
        capture_output=True,
        text=True,
        env=WITHOUT_THREADS,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    log = json.loads(result.stdout.splitlines()[-1])
    assert len(log) >= 20
    runs = int(log[-1][0]) + 1
    for run in range(runs):
        done = [
            sum(re.fullmatch(r"block-\d+\.json", name) is not None for name in names)
            for at, *names in log
            if at == str(run)
        ]
        assert done == sorted(done)  # no kill costs a finished block
        assert_same(tmp_path / f"out{run}", whole)
    names = {name for _, *names in log for name in names}
    assert any(name.startswith(".block-") for name in names), log  # killed in the middle of a block's file
    assert any(name.startswith((".rest", "checkpoint/")) for name in names), log  # while files were joined


def test_the_command_is_killed_then_interrupted_then_gone_on_with(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["prune", TINY, out, "--calibration", TEXT, "--samples", 8, "--seqlen", 32, "--dtype", "float32"]
    process = start(*arguments)
    wait_for(partial_of(out) / "block-00001.json", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=300)
    assert not out.exists()

    process = start(*arguments, "--resume")
    wait_for(partial_of(out) / "block-00004.json", process)
    os.killpg(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=300)
    assert process.returncode == 130, complaint
    kept = len(list(partial_of(out).glob("block-*.json")))
    assert 5 <= kept < BLOCKS
    assert complaint.splitlines()[-1] == (
        f"besa: interrupted; {kept} finished blocks are kept in {partial_of(out)}: go on with --resume."
    )
    assert "Traceback" not in complaint

    assert prune(out, resume=True).record.restored_blocks == kept
    assert_same(out, whole)


@pytest.mark.parametrize("left", [True, False])
def test_ctrl_c_before_the_journal_is_open_says_what_is_kept(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("besa.api.compress", stop)
    out = begun if left else tmp_path / "new"
    result = called("prune", TINY, out, "--resume")
    kept = f"what was finished before is kept in {partial_of(out)}: go on with --resume."
    said = kept if left else "unfinished work was not kept."
    assert (result.returncode, result.stderr) == (130, f"besa: interrupted; {said}\n")


def test_one_block_is_one(tmp_path: Path) -> None:
    for number, words in enumerate(("1 finished block is", "2 finished blocks are")):
        (tmp_path / f"block-0000{number}.json").write_text("{}")
        assert Journal(tmp_path).kept == words


def test_without_resume_a_second_run_is_refused(
    begun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--calibration", TEXT, "--samples", "8", "--seqlen", "32", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["besa", "prune", str(TINY), str(begun), *arguments])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 2
    assert capsys.readouterr().err.strip() == (
        f"besa: {partial_of(begun)} holds 5 finished blocks of an interrupted run: go on with --resume, or remove it."
    )
    assert len(list(partial_of(begun).glob("block-*.json"))) == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sparsity": 0.6}, "recipe.sparsity = 0.5, not 0.6"),
        ({"recipe": "wanda"}, "recipe.name = 'besa', not 'wanda'"),
        ({"recipe": Recipe.load("besa", overrides=["allocation.plain=1"])}, "recipe.allocation.plain = 0.5, not 1.0"),
        ({"seed": 1}, "seed = 0, not 1"),
        (
            {"calibration": str(TINY / "heldout.txt")},
            f"calibration.source = {TEXT!r}, not {str(TINY / 'heldout.txt')!r}",
        ),
        ({"samples": 4}, "calibration.samples = 8, not 4"),
        ({"bos": "yes"}, "calibration.bos = False, not True"),
        ({"batch": 3}, "batch = 8, not 3"),
        ({"dtype": "bfloat16"}, "model.dtype = 'float32', not 'bfloat16'"),
    ],
)
def test_another_run_is_not_gone_on_with(changes: dict[str, Any], words: str, begun: Path) -> None:
    with pytest.raises(BesaError) as refusal:
        prune(begun, resume=True, **changes)
    text = sentence(refusal)
    assert text.startswith(f"{partial_of(begun)} belongs to a run with ")
    assert text.endswith(f"{words}: use the same settings again, or remove the folder to start anew.")
    assert len(list(partial_of(begun).glob("block-*.json"))) == 5


def test_another_model_is_not_gone_on_with(tmp_path: Path) -> None:
    model, out = shutil.copytree(TINY, tmp_path / "model"), tmp_path / "out"
    with pytest.raises(STOPPED):
        prune(out, model=model, recipe="wanda", progress=stopped_after(1))
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(BesaError, match=r"model\.fingerprint = '[0-9a-f]{64}', not '[0-9a-f]{64}'"):
        prune(out, model=model, recipe="wanda", resume=True)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
}


@pytest.mark.parametrize(
    ("kind", "damage"),
    some_slow(
        product(("safetensors", "json"), DAMAGES),
        set(product(("safetensors", "json"), DAMAGES)) - {("safetensors", "flipped"), ("json", "missing")},
    ),
)
def test_a_damaged_block_is_done_again(kind: str, damage: str, whole: Path, begun: Path) -> None:
    DAMAGES[damage](partial_of(begun) / f"block-00002.{kind}")
    assert prune(begun, resume=True).record.restored_blocks == 4
    assert_same(begun, whole)


@pytest.mark.parametrize(
    "content",
    [b"{", b"null", b"[]", b'"record"', b'{"sha256": 1}', b'{"record": {}, "sha256": ""}', b"\xff", b"[" * 100_000],
)
def test_a_block_record_that_is_none_is_done_again(content: bytes, begun: Path) -> None:
    journal = Journal(partial_of(begun))
    assert journal.record(1) is not None
    (partial_of(begun) / "block-00001.json").write_bytes(content)
    assert journal.record(1) is None


def test_the_record_of_another_block_is_not_taken(begun: Path) -> None:
    folder = partial_of(begun)
    for kind in ("json", "safetensors"):
        shutil.copy(folder / f"block-00001.{kind}", folder / f"block-00003.{kind}")
    assert Journal(folder).record(3) is None


@pytest.mark.parametrize("content", ["{", "[" * 100_000])
def test_a_damaged_journal_is_refused(content: str, begun: Path) -> None:
    path = partial_of(begun) / "run.json"
    path.write_text(content)
    with pytest.raises(BesaError) as refusal:
        prune(begun, resume=True)
    assert sentence(refusal) == f"{path} is damaged: remove {partial_of(begun)} and run without --resume."


def test_full_disk_in_the_middle(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Path] = []

    @contextmanager
    def filling(path: Path) -> Iterator[Path]:
        with replacing(path) as partial:
            if len(saved) == 2:
                partial.write_bytes(b"half of")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            saved.append(path)
            yield partial

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(files, "replacing", filling)
        with pytest.raises(BesaError) as refusal:
            prune(out)
    path = partial_of(out) / "block-00002.safetensors"
    assert sentence(refusal) == f"The disk is full: {path} was not written; make room and run again."
    assert {path.name for path in partial_of(out).iterdir()} == {
        *(f"block-0000{block}.{kind}" for block in (0, 1) for kind in ("json", "safetensors")),
        "besa.lock",
        "run.json",
        "spent.json",
    }
    assert prune(out, resume=True).record.restored_blocks == 2
    assert_same(out, whole)


def test_full_disk_at_the_end(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def copy(source: Any, target: Any, size: int) -> None:
        target.write(source.read(1000))
        if "model.safetensors" in target.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        target.write(source.read())

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", copy)
        with pytest.raises(BesaError, match=r"^The disk is full: .*model\.safetensors was not written"):
            prune(out)
    assert not out.exists()
    assert prune(out, resume=True).record.restored_blocks == BLOCKS
    assert_same(out, whole)


def test_what_was_left_of_a_checkpoint_goes_before_room_is_asked_for(
    whole: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = partial_of(begun)

    def used() -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    blocks, asked = used(), []
    shutil.copytree(whole, folder / "checkpoint")
    for name in ("rest-00000.safetensors", "rest.safetensors", ".block-00005.safetensors.77.partial"):
        (folder / name).write_bytes(b"half of")
    monkeypatch.setattr(compressing, "check_space", lambda out, size: asked.append((used(), out)))
    assert prune(begun, resume=True).record.restored_blocks == 5
    assert asked == [(blocks, folder)]
    assert_same(begun, whole)


def test_a_second_process_at_the_same_out_is_refused(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refusals = []

    def progress(done: int, _: int, state: str) -> None:
        if done in (0, 3):
            for resume in (False, True):
                with pytest.raises(BesaError) as refusal:
                    prune(out, resume=resume)
                refusals.append(sentence(refusal))

    prune(out, progress=progress)
    assert len(refusals) >= 4
    assert set(refusals) == {f"Another besa process is writing {out}: wait for it, or choose another name."}
    assert_same(out, whole)


def test_a_run_that_fails_before_its_first_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BesaError, match="tokens"):
        prune(tmp_path / "out", samples=100_000)
    with pytest.raises(BesaError, match="Recipe"):
        prune(tmp_path / "out", recipe="besa", sparsity=1.5)
    with pytest.raises(STOPPED):
        prune(tmp_path / "out", progress=lambda done, blocks, state: os.kill(os.getpid(), signal.SIGINT))
    assert list(tmp_path.iterdir()) == []


def test_resume_where_nothing_is_starts_anew(whole: Path, tmp_path: Path) -> None:
    assert prune(tmp_path / "out", resume=True).record.restored_blocks == 0
    assert_same(tmp_path / "out", whole)


@pytest.mark.parametrize("resume", [False, True])
def test_an_out_that_exists_is_refused(resume: bool, begun: Path) -> None:
    begun.mkdir()
    with pytest.raises(BesaError) as refusal:
        prune(begun, resume=resume)
    assert sentence(refusal) == f"{begun} exists already: choose another name, or remove it first."
    assert list(begun.iterdir()) == []
    assert len(list(partial_of(begun).glob("block-*.json"))) == 5


def test_a_loaded_model_does_not_resume(begun: Path, tiny_llama: PreTrainedModel, tiny_tokenizer: object) -> None:
    with pytest.raises(BesaError, match="give its path"):
        compress(tiny_llama, "besa", TEXT, out=begun, tokenizer=tiny_tokenizer, samples=8, seqlen=32, resume=True)
    assert len(list(partial_of(begun).glob("block-*.json"))) == 5


def test_tensors_come_in_one_order() -> None:
    """Whatever the hash seed of the process: the bytes of OUT depend on it."""
    with safe_open(TINY / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert WeightFiles(TINY).names in (names, sorted(names))


# --- what is not besa's, and what comes in between ---


def test_a_folder_that_is_not_besa_s_is_left_alone(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for folder in (partial_of(out), tmp_path / ".packed.partial"):
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    in_the_way = r"is in the way and was not made by besa: rename it, or choose another name\.$"
    for resume in (False, True):
        with pytest.raises(BesaError, match=in_the_way):
            prune(out, resume=resume)
    with pytest.raises(BesaError, match=in_the_way):
        pack(whole, tmp_path / "packed")
    shutil.copytree(whole, tmp_path / "model.partial")  # a finished checkpoint may have such a name
    with pytest.raises(BesaError, match=in_the_way):
        prune(tmp_path / "model")
    assert len(list(tmp_path.rglob("notes.txt"))) == 2
    assert (tmp_path / "model.partial" / "model.safetensors").exists()


@pytest.mark.parametrize("ending", some_slow(["the last block", "Ctrl-C"], {"the last block"}))
def test_an_out_that_comes_into_being_meanwhile_costs_no_block(ending: str, whole: Path, begun: Path) -> None:
    def progress(done: int, _: int, state: str) -> None:
        if done == 6 and state != "embeddings":
            begun.mkdir(exist_ok=True)
            if ending == "Ctrl-C":
                raise KeyboardInterrupt

    with pytest.raises((BesaError, Interrupted)) as stopped:
        prune(begun, resume=True, progress=progress)
    assert str(stopped.value) == (
        f"interrupted; 6 finished blocks are kept in {partial_of(begun)}: go on with --resume."
        if ending == "Ctrl-C"
        else f"Another program created {begun} during the run: rename it, then run again with --resume."
    )
    begun.rename(begun.with_name("other"))
    assert prune(begun, resume=True).record.restored_blocks == (6 if ending == "Ctrl-C" else BLOCKS)
    assert_same(begun, whole)


def test_names_that_nothing_new_can_have(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BesaError, match=r"link exists already: choose another name"):
        prune(tmp_path / "link")
    with pytest.raises(BesaError, match=r"is no name for something new: end it with a name\.$"):
        prune(tmp_path / "new" / "..")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_seconds_are_those_of_the_whole_run(begun: Path) -> None:
    before = json.loads((partial_of(begun) / "spent.json").read_text())
    (partial_of(begun) / "spent.json").write_text(json.dumps(before + 1000))
    record = prune(begun, resume=True).record
    assert 1000 + before < record.seconds < 2000
    assert before > 0


def test_a_run_that_goes_on_elsewhere_says_so(begun: Path) -> None:
    path = partial_of(begun) / "run.json"
    began = json.loads(path.read_text())
    (here,) = began["origins"]
    began["origins"] = [here | {"machine": here["machine"] | {"threads": threads}} for threads in (77, 78)]
    path.write_text(json.dumps(began | {"origins": [*began["origins"], here]}))
    notes = [
        f"A part of the run was made with machine.threads = {threads}, not {torch.get_num_threads()}: the result may "
        "differ from that of an uninterrupted run."
        for threads in (77, 78)
    ]
    with pytest.warns(Notice, match=r"^A part of the run was made with machine\.threads = 7[78], not "):
        record = prune(begun, resume=True).record
    assert set(notes) <= set(record.notes) and len(record.notes) == len(set(record.notes))
    assert record.restored_blocks == 5


def test_a_run_that_goes_on_with_other_ranks_says_so(begun: Path) -> None:
    """Also where the threads of each rank are others; journals of before do not say how many ranks there were."""
    path = partial_of(begun) / "run.json"
    began = json.loads(path.read_text())
    (here,) = began["origins"]
    assert here.pop("ranks") == 1
    there = {"machine": here["machine"] | {"threads": 77}, "ranks": 3}
    path.write_text(json.dumps(began | {"origins": [here, here | there]}))
    with pytest.warns(Notice, match=r"^A part of the run was made with ranks = 3, not 1: the result may differ from"):
        notes = prune(begun, resume=True).record.notes
    made = [note.partition(":")[0] for note in notes if note.startswith("A part of the run was made with ")]
    assert made == [
        f"A part of the run was made with machine.threads = 77, not {torch.get_num_threads()}",
        "A part of the run was made with ranks = 3, not 1",
    ]


def test_what_was_measured_before_the_blocks_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    settings = {"recipe": "fast", "samples": 4}
    whole = prune(tmp_path / "whole", **settings)
    with pytest.raises(Interrupted) as interruption:
        prune(out, **settings, progress=stopped_once_measured(out))
    assert (
        str(interruption.value) == f"interrupted; what was measured is kept in {partial_of(out)}: go on with --resume."
    )
    with pytest.raises(
        BesaError, match=r"belongs to a run with calibration\.seed = 0, not 1: use the same settings again"
    ):
        prune(out, **settings, seed=1, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "loss_gradients", lambda *_, **__: pytest.fail("it was measured again"))
        assert prune(out, **settings, resume=True).record.sparsity == whole.record.sparsity
    assert_same(out, tmp_path / "whole")


def test_a_run_goes_on_with_other_names_of_its_model_and_text(
    begun: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TINY)
    record = prune(begun, resume=True, model=".", calibration=Path(TEXT).name).record
    assert record.restored_blocks == 5
    assert_same(begun, whole)


def test_without_resume_what_was_measured_is_measured_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        prune(out, recipe="fast", samples=4, progress=stopped_once_measured(out))
    record = prune(out, recipe="wanda", samples=4, seed=1, batch=3).record
    assert (record.seed, record.batch) == (1, 3)
    assert not partial_of(out).exists()


def test_others_may_read_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "ONE_FILE", 100_000)
    prune(tmp_path / "out", recipe="wanda", samples=2)
    (tmp_path / "usual").touch()
    paths = list((tmp_path / "out").glob("*.safetensors"))
    assert len(paths) > 1
    assert {path.stat().st_mode for path in paths} == {(tmp_path / "usual").stat().st_mode}
