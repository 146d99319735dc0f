"""`besa push` against a Hub on the loopback address: what arrives, what stays, what is refused, and going on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import besa
from besa import BesaError, cli
from besa.checkpoint import writer
from besa.errors import Notice
from besa.models import hub as fetching
from tests.conftest import TINY_LLAMA as TINY
from tests.loopback_hub import LoopbackHub, loopback_hub
from tests.slowly import some_slow

TOKEN = "hf_loopback"
REPO = "me/tiny"
SIZES: dict[str, Any] = {"samples": 4, "seqlen": 32}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned checkpoint in one file and in shards, and a packed one, measured."""
    folder = tmp_path_factory.mktemp("made")
    text = str(TINY / "calibration.txt")
    besa.compress(TINY, "wanda", text, out=folder / "one", **SIZES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "ONE_FILE", 0)
        besa.compress(TINY, "magnitude", text, out=folder / "shards", **SIZES)
    besa.pack(folder / "one", folder / "packed")
    measured = besa.evaluate(folder / "packed", [str(TINY / "heldout.txt")], window=64, max_windows=4)
    (folder / "packed" / "besa_eval.json").write_text(measured.model_dump_json())
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: shutil.copytree(made / name, tmp_path / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with loopback_hub() as hub:
        hub.patch(monkeypatch, tmp_path / "home")
        hub.tokens[TOKEN], hub.writers[TOKEN] = set(), {"me"}
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield hub


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def on_hub(hub: LoopbackHub, repo: str = REPO) -> dict[str, bytes]:
    """The files of a repository, but for the one that the Hub itself makes."""
    repository = hub.repositories[repo]
    files = repository.commits[repository.refs["refs/heads/main"]].files
    return {name: blob.content for name, blob in files.items() if name != ".gitattributes"}


def refused(folder: Path, repo: str = REPO, **options: Any) -> str:
    with pytest.raises(BesaError) as refusal:
        besa.push(folder, repo, **options)
    text = str(refusal.value)
    assert re.fullmatch(r"[^\n]+\.", text), text
    return text


# What arrives.


def test_a_checkpoint_arrives_with_its_card_and_its_measurements(hub: LoopbackHub, copy: Callable[[str], Path]) -> None:
    folder = copy("packed")
    told: list[tuple[float, float]] = []
    pushed = besa.push(folder, REPO, progress=lambda done, total, name: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > 0
    assert on_hub(hub) == contents(folder)
    assert pushed.files == sorted(contents(folder))
    assert (pushed.repo, pushed.url, pushed.changed) == (REPO, f"{hub.url}/{REPO}", True)
    assert (pushed.left_out, pushed.removed) == ([], [])
    repository = hub.repositories[REPO]
    assert pushed.commit == repository.refs["refs/heads/main"]
    assert len(repository.commits) == 2  # with the one that the Hub makes: nobody sees half of a model
    assert not repository.private
    card = ModelCard(on_hub(hub)["README.md"].decode())
    (result,) = card.data.eval_results
    assert result.metric_value == json.loads((folder / "besa_eval.json").read_text())["perplexity"]["heldout"]
    assert f"besa generate {REPO} " in card.text
    besa.verify(folder)


def test_what_was_pushed_is_fetched_and_is_the_same(
    hub: LoopbackHub, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy("shards")
    besa.push(folder, REPO, private=True)
    assert hub.repositories[REPO].private
    fetched = fetching.fetch(REPO)
    besa.verify(fetched)
    assert contents(fetched) == contents(folder)
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, fetched))
    assert all(bool((before[name] == after[name]).all()) for name in before)
    besa.pack(REPO, tmp_path / "again")
    assert ModelCard.load(tmp_path / "again" / "README.md").data.tags == ["besa", "pruned", "sparse", "bitmask"]


def test_only_what_belongs_is_uploaded(hub: LoopbackHub, copy: Callable[[str], Path]) -> None:
    folder = copy("one")
    before = contents(folder).keys()
    (folder / "secret.txt").write_text("mine")
    (folder / "optimizer.dat").write_bytes(b"x")
    (folder / "besa_simulation.json").write_text("{}")
    for name in (".git/HEAD", ".cache/huggingface/x", "runs/a/b"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("x")
    pushed = besa.push(folder, REPO)
    assert pushed.left_out == [".cache/", ".git/", "optimizer.dat", "runs/", "secret.txt"]
    assert on_hub(hub).keys() == before | {"besa_simulation.json"}


def test_the_next_push_sends_what_changed(hub: LoopbackHub, copy: Callable[[str], Path]) -> None:
    folder = copy("one")
    first = besa.push(folder, REPO)
    sent = len(hub.asked("", "PUT"))
    again = besa.push(folder, REPO)
    assert (again.commit, again.changed) == (first.commit, False)
    readme = (folder / "README.md").read_text()
    (folder / "README.md").write_text(f"{readme}\nMore to say.\n")
    third = besa.push(folder, REPO)
    assert third.changed
    assert on_hub(hub)["README.md"].decode().endswith("\nMore to say.\n")
    assert len(hub.asked("", "PUT")) == sent == 1


def test_weights_of_an_earlier_push_do_not_stay_beside_others(
    hub: LoopbackHub, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    besa.push(copy("shards"), REPO)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter.safetensors").write_bytes(b"x")
    repository = hub.repositories[REPO]
    files = repository.commits[repository.refs["refs/heads/main"]].files
    hub.add(REPO, tmp_path / "mine")
    repository.commit(dict(files) | repository.commits[repository.refs["refs/heads/main"]].files)
    folder = copy("packed")
    pushed = besa.push(folder, REPO)
    assert len(pushed.removed) > 8
    assert all(re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name) for name in pushed.removed)
    assert on_hub(hub) == contents(folder) | {"adapter.safetensors": b"x"}


# What is refused.


@pytest.mark.parametrize(
    "repo", ["tiny", "a/b/c", "me/", "/tiny", "me/ti ny", "me/tiny.git", "../tiny", "", "me/-tiny"]
)
def test_a_name_that_no_repository_has(repo: str, hub: LoopbackHub, made: Path) -> None:
    words = f"{repo!r} cannot be the name of a repository: write USER/NAME or ORGANISATION/NAME."
    assert refused(made / "one", repo) == words
    assert not hub.requests


def test_nobody_is_logged_in(hub: LoopbackHub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert "`hf auth login`" in refused(made / "one")
    assert not hub.requests


def test_the_hub_does_not_know_the_token(hub: LoopbackHub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_yesterday")
    assert refused(made / "one") == (
        "The Hugging Face Hub does not know your token: log in with `hf auth login`."
    )  # fmt: skip


def test_no_right_to_write(hub: LoopbackHub, made: Path) -> None:
    assert refused(made / "one", "others/tiny").startswith("You may not write to others/tiny (")
    assert "others/tiny" not in (made / "one" / "README.md").read_text()
    hub.add("others/tiny", made / "one")  # one that is there can be read all the same
    before = on_hub(hub, "others/tiny")
    assert refused(made / "one", "others/tiny").startswith("You may not write to others/tiny (")
    assert on_hub(hub, "others/tiny") == before


def test_private_is_not_ignored_where_the_repository_is_public(hub: LoopbackHub, copy: Callable[[str], Path]) -> None:
    folder = copy("one")
    besa.push(folder, REPO)
    (folder / "besa_simulation.json").write_text("{}")
    assert refused(folder, private=True).startswith(f"{REPO} exists and is public: leave out --private")
    assert "besa_simulation.json" not in on_hub(hub)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "is no folder"),
        (lambda folder: (folder / "besa_run.json").unlink(), "has no digests to verify"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "lacks tokenizer.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), "has changed since it was written"),
        (lambda folder: (folder / "pytorch_model.bin").touch(), "was not written with the other files"),
        (lambda folder: (folder / "besa_eval.json").write_text("{"), "besa_eval.json is not a besa evaluation"),
    ],
)
def test_what_is_no_checkpoint_or_was_damaged(
    damage: Callable[[Path], object], words: str, hub: LoopbackHub, copy: Callable[[str], Path]
) -> None:
    folder = copy("one")
    damage(folder)
    assert words in refused(folder)
    assert not hub.requests


def test_offline(hub: LoopbackHub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refused(made / "one").startswith("HF_HUB_OFFLINE is set, so nothing can be uploaded")
    assert not hub.requests


def test_nobody_answers(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with loopback_hub() as gone:
        gone.patch(monkeypatch, tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert re.match(rf"The upload to {REPO} broke off \(.*\): push again", refused(made / "one"))


def test_a_card_that_the_hub_refuses_is_sent_with_nothing(hub: LoopbackHub, copy: Callable[[str], Path]) -> None:
    folder = copy("one")
    readme = (folder / "README.md").read_text()
    (folder / "README.md").write_text(readme.replace("---\n", "---\nlicense: {a: b}\n", 1))
    assert refused(folder).startswith("The Hugging Face Hub refuses the card (Invalid metadata in README.md.")
    assert not on_hub(hub)
    assert not hub.large
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.warns(Notice, match=r"README\.md was left as it is"):
        assert "refuses the card" in refused(folder)


def test_the_hub_fails_at_the_end(hub: LoopbackHub, copy: Callable[[str], Path]) -> None:
    hub.failing["/commit/main"] = [500]
    folder = copy("one")
    assert "(500, " in refused(folder)
    assert not on_hub(hub)
    sent = len(hub.asked("", "PUT"))
    besa.push(folder, REPO)
    assert on_hub(hub) == contents(folder)
    assert len(hub.asked("", "PUT")) == sent


# The command, killed and started again.


def command(hub: LoopbackHub, folder: Path, home: Path) -> subprocess.Popen[str]:
    environment = os.environ | hub.environment(home) | {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "COLUMNS": "300"}
    return subprocess.Popen(
        [sys.executable, "-m", "besa", "push", str(folder), REPO],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("end", some_slow([signal.SIGKILL, signal.SIGINT], {signal.SIGINT}))
def test_a_push_that_was_ended_goes_on_where_it_was(
    end: signal.Signals, hub: LoopbackHub, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy("shards")
    shards = len(list(folder.glob("*.safetensors")))
    hub.room = 3
    with command(hub, folder, tmp_path / "home") as process:
        deadline = time.monotonic() + 100
        while len(hub.large) < 3 or not hub.full.is_set():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(end)
        if end == signal.SIGINT:
            hub.room_made.set()  # huggingface_hub waits for the uploads that it has begun
        _, said = process.communicate(timeout=600)
    assert process.returncode == (-end if end == signal.SIGKILL else 130)
    if end == signal.SIGINT:
        assert "push again, and it goes on with what is missing." in said
        assert "Traceback" not in said
    assert not on_hub(hub)
    kept = len(hub.large)
    hub.room = 1 << 30
    hub.requests.clear()
    besa.push(folder, REPO)
    # By path: the hub may still note the last request of the program that was killed.
    assert len({request.path for request in hub.asked("", "PUT")}) == shards - kept
    assert on_hub(hub) == contents(folder)
    besa.verify(folder)
    assert not list(folder.glob(".*"))


def test_the_command_says_what_it_did_not_take(
    hub: LoopbackHub, copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    besa.push(copy("one"), REPO)
    folder = copy("packed")
    (folder / "notes.txt").write_text("x")
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys, "argv", ["besa", "push", str(folder), REPO])
    cli.main()
    commit = hub.repositories[REPO].refs["refs/heads/main"]
    assert capsys.readouterr().out.splitlines() == [
        f"{hub.url}/{REPO}: {len(contents(folder)) - 1} files in commit {commit}",
        "removed there, as this checkpoint has other weight files: model.safetensors",
        "not uploaded, as no part of the checkpoint: notes.txt",
    ]
    cli.main()
    assert f"in commit {commit}, which was there already\n" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["besa", "push", str(folder), "tiny"])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 2
    assert "besa: 'tiny' cannot be the name of a repository" in capsys.readouterr().err
