"""Models from a Hub that speaks the real protocol: found, fetched once, of a commit that is recorded, or refused."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import besa
from besa.checkpoint import writer
from besa.checkpoint.inspection import inspect
from besa.checkpoint.packing import pack, unpack
from besa.cli import app
from besa.errors import BesaError, Interrupted
from besa.models import hub as fetching
from besa.models.finding import find_blocks
from besa.models.source import locate
from besa.models.whole import head_share
from besa.planning import spending
from besa.record import RunRecord
from besa.report import load_run, render
from besa.runtime.linear import SparseLinear
from besa.storage.names import partial_folder
from besa.studies.workspace import Conditions, Measures, Workspace
from tests.loopback_hub import Blob, LoopbackHub, loopback_hub

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "assets" / "tiny-llama"
TEXT = str(TINY / "heldout.txt")
SMALL = {"calibration": TEXT, "samples": 2, "seqlen": 16}
WEIGHTS = "model.safetensors"
NOBODY = "http://127.0.0.1:9"  # nothing listens there


def llama(folder: Path, seed: int, **saving: Any) -> Path:
    """A random model, which is made faster than any is downloaded, with a card."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder, **saving)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA random model.\n")
    (folder / "LICENSE").write_text("Apache")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two versions of a model, the first also in shards, pruned, and packed."""
    place = tmp_path_factory.mktemp("models")
    found = {"first": llama(place / "first", 0), "second": llama(place / "second", 1)}
    found["shards"] = llama(place / "shards", 0, max_shard_size="100KB")
    besa.compress(found["first"], "magnitude", out=place / "pruned", **SMALL)
    pack(place / "pruned", place / "packed")
    return found | {name: place / name for name in ("pruned", "packed")}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with loopback_hub() as served:
        served.patch(monkeypatch, cache)
        yield served


@pytest.fixture
def commits(hub: LoopbackHub, folders: dict[str, Path]) -> tuple[str, str]:
    """`org/model` with a branch, a tag and a pull request at its first version, and its second on main."""
    first = hub.add("org/model", folders["first"])
    second = hub.add("org/model", folders["second"])
    repository = hub.repositories["org/model"]
    repository.tag("v1", first)
    repository.refs |= {"refs/heads/old": first, "refs/pr/4": first}
    return first, second


def unplug(patch: pytest.MonkeyPatch) -> None:
    """From now on there is no connection."""
    constants = huggingface_hub.constants
    patch.setattr(constants, "ENDPOINT", NOBODY)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", NOBODY + "/{repo_id}/resolve/{revision}/{filename}")


def forbid(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def same(left: PreTrainedModel, right: PreTrainedModel) -> bool:
    first, second = left.state_dict(), right.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def sentence(refusal: "pytest.ExceptionInfo[BesaError]") -> str:
    text = str(refusal.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(BesaError) as refusal:
        call()
    return sentence(refusal)


@pytest.mark.parametrize("revision", ["", "@main", "@old", "@v1", "@refs/pr/4", "@SHA", "@SHORT"])
def test_a_revision_is_a_branch_a_tag_or_a_commit(
    revision: str, commits: tuple[str, str], folders: dict[str, Path]
) -> None:
    revision = {"@SHA": f"@{commits[0]}", "@SHORT": f"@{commits[0][:8]}"}.get(revision, revision)
    version, sha = ("second", commits[1]) if revision in ("", "@main") else ("first", commits[0])
    source = locate(f"org/model{revision}").local()
    assert (source.name, source.base, source.revision) == (f"org/model{revision}", "org/model", sha)
    assert source.pinned == f"org/model@{sha}"
    assert same(besa.load(f"org/model{revision}"), besa.load(folders[version]))


def test_what_is_pruned_is_as_from_the_folder_and_says_of_which_commit(
    commits: tuple[str, str], folders: dict[str, Path], tmp_path: Path
) -> None:
    record = besa.compress("org/model@v1", "wanda", out=tmp_path / "hub", **SMALL).record
    besa.compress(folders["first"], "wanda", out=tmp_path / "local", **SMALL)
    found, expected = (load_file(tmp_path / name / WEIGHTS) for name in ("hub", "local"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    names = {path.name for path in (tmp_path / "hub").iterdir()}
    assert names == {path.name for path in (tmp_path / "local").iterdir()}
    assert "LICENSE" in names
    card = ModelCard.load(tmp_path / "hub" / "README.md")  # not that of the model that was pruned
    assert (card.data.base_model, card.data.license) == ("org/model", "apache-2.0")
    assert f"commit `{commits[0][:12]}`" in card.text
    assert "A random model." not in card.text
    assert ModelCard.load(tmp_path / "local" / "README.md").data.base_model is None
    assert (record.model["source"], record.model["revision"]) == ("org/model", commits[0])
    assert record.model["fingerprint"] == RunRecord.read(tmp_path / "local" / "besa_run.json").model["fingerprint"]


def test_an_evaluation_says_of_which_commit_and_the_report_asks_for_that(
    commits: tuple[str, str], folders: dict[str, Path], tmp_path: Path
) -> None:
    measures = {"texts": [TEXT], "window": 16, "max_windows": 4}
    found, expected = (besa.evaluate(model, **measures) for model in ("org/model@v1", folders["first"]))
    assert found.perplexity == expected.perplexity
    assert (found.model, found.revision, expected.revision) == ("org/model", commits[0], None)
    besa.compress("org/model@v1", "wanda", out=tmp_path / "out", **SMALL)
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "besa_eval.json").write_text(found.model_dump_json())
    page = render([load_run(tmp_path / "dense"), load_run(tmp_path / "out")])
    for command in ("eval", "prune"):
        assert f"besa {command} org/model@{commits[0]} " in page
    other = found.model_copy(update={"revision": commits[1], "fingerprint": "cd" * 32})
    assert "which is not the model that was pruned" not in page
    (tmp_path / "dense" / "besa_eval.json").write_text(other.model_dump_json())
    page = render([load_run(tmp_path / "dense"), load_run(tmp_path / "out")])
    assert f"@{commits[1]}, which is not the model that was pruned" in page


def test_what_is_counted_and_measured_says_of_which_commit(
    commits: tuple[str, str], folders: dict[str, Path], tmp_path: Path
) -> None:
    def run(*command: str | Path) -> str:
        done = CliRunner().invoke(app, [*map(str, command)], catch_exceptions=False, env={"COLUMNS": "200"})
        assert done.exit_code == 0
        return done.stdout

    kept = tmp_path / "dense"
    kept.mkdir()
    evaluation = besa.evaluate("org/model@v1", [TEXT], window=16, max_windows=1)
    (kept / "besa_eval.json").write_text(evaluation.model_dump_json())
    names = ["org/model@v1", "org/model"]
    pins = [f"org/model@{commit}" for commit in commits]
    page = run("simulate", names[0], "--method-baseline", names[1], "--json", kept / "besa_simulation.json")
    assert all(pin in page for pin in pins)
    assert pins[0] in run("inspect", names[0], "--json", kept / "inspect.json")
    page = run("bench", *names, "--rounds", "1", "--json", kept / "besa_bench.json")
    assert all(pin[: len("org/model@") + 12] in page for pin in pins)
    found = [json.loads((kept / f"{name}.json").read_text()) for name in ("besa_simulation", "inspect")]
    speeds = json.loads((kept / "besa_bench.json").read_text())["models"]
    assert {(each["model"], each["revision"]) for each in found} == {("org/model", commits[0])}
    assert {(each["model"], each["revision"]) for each in speeds} == {("org/model", commit) for commit in commits}
    page = render([load_run(kept)])
    assert f"besa simulate {pins[0]} " in page
    assert f"{pins[1][: len('org/model@') + 12]}<" in page
    assert besa.simulate(folders["first"], [1]).revision is None
    assert "named twice" in refused(lambda: besa.bench(["org/model@old", "org/model@v1"]))


def test_a_plan_downloads_no_weights(hub: LoopbackHub, folders: dict[str, Path]) -> None:
    hub.add("org/model", folders["shards"])
    hub.add("org/packed", folders["packed"])
    found, expected = (besa.plan(model, samples=4, seqlen=16) for model in ("org/model", folders["first"]))
    same_but = {"model": "", "memory_bytes": 0}  # of the process, which differs from moment to moment
    assert found.model_copy(update=same_but) == expected.model_copy(update=same_but)
    assert "org/packed is packed" in refused(lambda: besa.plan("org/packed"))
    assert not [each for each in hub.requests if each.path.endswith(".safetensors")]


def test_packed_and_sharded_repositories(hub: LoopbackHub, folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("pruned", "packed", "shards"):
        hub.add(f"org/{name}", folders[name])
    pack("org/pruned", tmp_path / "packed")
    assert (tmp_path / "packed" / "bitmask.safetensors").read_bytes() == (
        folders["packed"] / "bitmask.safetensors"
    ).read_bytes()
    unpack("org/packed", tmp_path / "dense")
    assert same(besa.load(tmp_path / "dense"), besa.load(folders["pruned"]))
    x_NT = torch.arange(5, 25)[None]
    assert torch.equal(besa.load("org/packed")(x_NT).logits, besa.load(folders["packed"])(x_NT).logits)
    assert inspect(locate("org/packed")).zeros == inspect(locate(folders["packed"])).zeros
    assert same(besa.load("org/shards", verify=False), besa.load(folders["first"]))
    assert same(besa.load("org/pruned", verify=True), besa.load(folders["pruned"]))


def test_plain_transformers_load_a_packed_repository(
    hub: LoopbackHub, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and in shards, of a revision, and once more from the cache without a connection."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "ONE_FILE", 0)
        pack(folders["pruned"], tmp_path / "shards")
    commit = hub.add("org/whole", folders["packed"])
    hub.add("org/whole", folders["pruned"])
    hub.add("org/shards", tmp_path / "shards")
    x_NT = torch.arange(5, 25)[None]
    expected = besa.load(folders["packed"])(x_NT).logits
    for plug in (lambda: None, lambda: forbid(monkeypatch)):
        plug()
        for name, revision in (("org/whole", commit), ("org/shards", None)):
            model, info = AutoModelForCausalLM.from_pretrained(name, revision=revision, output_loading_info=True)
            assert not any(info.values())
            assert isinstance(model.model.layers[0].mlp.up_proj, SparseLinear)
            assert torch.equal(model(x_NT).logits, expected)


def test_only_what_is_needed_is_downloaded(hub: LoopbackHub, folders: dict[str, Path], tmp_path: Path) -> None:
    files = {path.name: Blob(path) for path in folders["shards"].iterdir()}
    other = {"pytorch_model.bin", "consolidated.safetensors", "original/params.json", "onnx/model.onnx", "figure.png"}
    other |= {"model.fp16.safetensors", "original/consolidated.safetensors", "adapter_config.json", "old.safetensors"}
    beside = {"chat_template.jinja", "tokenizer.model", "USE_POLICY.md", "additional_chat_templates/tools.jinja"}
    blob = Blob(folders["first"] / "LICENSE")
    sha = hub.add("org/model", folders["shards"])
    sha = hub.repositories["org/model"].commit(files | dict.fromkeys(other | beside, blob))
    folder = fetching.fetch("org/model")
    assert folder.name == sha
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == set(files) | beside
    hub.repositories["org/model"].commit(files | {WEIGHTS: Blob(folders["first"] / WEIGHTS)})  # beside stale shards
    assert {path.name for path in fetching.fetch("org/model").glob("*.safetensors")} == {WEIGHTS}


class Told:
    """A progress that keeps what it is told of downloads."""

    def __init__(self) -> None:
        self.reports: list[tuple[float, float]] = []

    def __call__(self, done: float, total: float, note: str = "") -> None:
        if note == "downloading org/model":
            self.reports.append((done, total))


def told(call: Callable[[Any], object]) -> list[tuple[float, float]]:
    progress = Told()
    call(progress)
    return progress.reports


def test_a_download_tells_its_bytes(
    hub: LoopbackHub, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between attempts
    hub.add("org/model", folders["shards"])
    shards = {path.name: path.stat().st_size for path in folders["shards"].glob("model-*")}
    hub.broken = {min(shards): [20_000]}
    read_first = ("config.json", f"{WEIGHTS}.index.json")
    beside = sum(path.stat().st_size for path in folders["shards"].iterdir() if path.name not in (*shards, *read_first))
    capfd.readouterr()
    reports = told(lambda progress: besa.load("org/model", progress=progress))
    total = beside + sum(shards.values())
    assert {each for _, each in reports} == {total}
    done = [each for each, _ in reports]
    assert (done[0], done[-1]) == (0, total)
    assert done == sorted(set(done))
    assert len(done) > sum(shards.values()) / 10_000
    assert not told(lambda progress: besa.load("org/model", progress=progress))
    assert capfd.readouterr() == ("", "")
    (fetching.fetch("org/model") / min(shards)).resolve().unlink()
    assert told(lambda progress: besa.load("org/model", progress=progress))[-1] == (shards[min(shards)],) * 2
    hub.repositories["org/model"].commit(dict(next(iter(hub.repositories["org/model"].commits.values())).files))
    assert told(lambda progress: besa.load("org/model", progress=progress)) == [(0, total), (total, total)]


def test_a_download_through_xet_tells_its_bytes(
    commits: tuple[str, str],
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As huggingface_hub hears of one from hf_xet: bytes of the network first, which are fewer, then of the file."""

    def get(url: str, temp_file: Any, *, expected_size: int, tqdm_class: Any, **_: Any) -> None:
        content = (folders["second"] / url.rpartition("/")[2]).read_bytes()
        with XetDownloadProgressReporter(
            reconstruction_desc="", total=expected_size, log_level=logging.WARNING, tqdm_class=tqdm_class
        ) as reporter:
            for network, disk in ((0.5, 0.0), (0.7, 0.6), (0.7, 1.0)):
                report = {"total_bytes": expected_size, "total_bytes_completed": int(disk * expected_size)}
                report |= {"total_transfer_bytes_completed": int(network * expected_size)}
                report |= {"total_bytes_completion_rate": 1.0, "total_transfer_bytes_completion_rate": None}
                reporter.update_progress(SimpleNamespace(**report))
        temp_file.write(content)

    monkeypatch.setattr("huggingface_hub.file_download.http_get", get)
    capfd.readouterr()
    reports = told(lambda progress: besa.load("org/model", progress=progress))
    total = sum(path.stat().st_size for path in folders["second"].iterdir() if path.name != "config.json")
    assert reports[-1] == (total, total)
    assert reports == [(each, total) for each in sorted({done for done, _ in reports})]
    size = (folders["second"] / WEIGHTS).stat().st_size
    assert any(int(0.5 * size) <= done < size for done, _ in reports)
    assert capfd.readouterr() == ("", "")
    assert same(besa.load("org/model"), besa.load(folders["second"]))


@pytest.mark.parametrize(
    "call",
    [
        lambda out, progress: besa.compress("org/model", "magnitude", out=out, progress=progress, **SMALL),
        lambda out, progress: besa.evaluate("org/model", [TEXT], window=16, max_windows=1, progress=progress),
        lambda out, progress: besa.generate("org/model", "The", max_new_tokens=1, progress=progress),
        lambda out, progress: besa.simulate("org/model", [1], progress=progress),
        lambda out, progress: besa.bench(["org/model"], rounds=1, progress=progress),
        lambda out, progress: besa.pack("org/model", out, progress=progress),
        lambda out, progress: inspect(locate("org/model"), progress),
    ],
)
def test_whatever_downloads_tells_of_it(
    call: Callable[..., object], hub: LoopbackHub, folders: dict[str, Path], tmp_path: Path
) -> None:
    hub.add("org/model", folders["pruned"])
    reports = told(lambda progress: call(tmp_path / "out", progress))
    assert reports[0][0] == 0
    assert reports[-1][0] == reports[-1][1] > (folders["pruned"] / WEIGHTS).stat().st_size


def test_a_commit_in_the_cache_is_asked_for_no_more(hub: LoopbackHub, commits: tuple[str, str]) -> None:
    first = besa.load("org/model@v1")
    before = len(hub.requests)
    assert same(besa.load(f"org/model@{commits[0]}"), first)
    assert len(hub.requests) == before
    assert same(besa.load("org/model@v1"), first)
    assert [each.path for each in hub.requests[before:]] == ["/api/models/org/model/revision/v1"]


@pytest.mark.parametrize("away", [unplug, forbid])
def test_without_a_connection_the_cache_is_enough(
    away: Callable[[pytest.MonkeyPatch], None],
    commits: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    expected = besa.load("org/model")
    besa.plan("org/model@v1")
    away(monkeypatch)
    capfd.readouterr()
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [caplog.handler])
    for name in ("org/model", f"org/model@{commits[1]}"):
        assert same(besa.load(name), expected)
    record = besa.compress("org/model", "magnitude", out=tmp_path / "out", **SMALL).record
    assert record.model["revision"] == commits[1]
    assert besa.plan("org/model@v1").blocks == 2
    assert capfd.readouterr() == ("", "")
    assert not caplog.messages
    assert not [str(each.message) for each in recwarn.list if each.category is not ResourceWarning]


@pytest.mark.parametrize(
    ("away", "why"),
    [
        (unplug, "the Hugging Face Hub cannot be reached ([Errno 111] Connection refused): try again when it can."),
        (forbid, "HF_HUB_OFFLINE forbids to ask the Hugging Face Hub for it: unset that."),
    ],
)
def test_without_a_connection_what_the_cache_lacks_is_said(
    away: Callable[[pytest.MonkeyPatch], None],
    why: str,
    commits: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    besa.plan("org/model@v1")
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)  # between attempts
    away(monkeypatch)
    assert refused(lambda: besa.load("org/model@v1")) == f"Only a part of org/model@v1 is in the cache, and {why}"
    for name in ("org/model", "org/other", f"org/model@{commits[1]}"):
        for call in (besa.load, besa.plan):
            assert (
                refused(lambda call=call, name=name: call(name))
                == f"{name} is neither a folder here nor in the cache, and {why}"
            )
    assert not waited


def test_what_other_programs_have_in_the_cache_is_used(
    hub: LoopbackHub, commits: tuple[str, str], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/shards", folders["shards"])
    for name in ("config.json", WEIGHTS):  # as by from_pretrained, which keeps no listing
        huggingface_hub.hf_hub_download("org/model", name)
    for name in ("config.json", f"{WEIGHTS}.index.json", next(folders["shards"].glob("model-*")).name):
        huggingface_hub.hf_hub_download("org/shards", name)
    with monkeypatch.context() as patch:
        unplug(patch)
        assert same(besa.load("org/model"), besa.load(folders["second"]))
        assert refused(lambda: besa.load("org/shards")).startswith("Only a part of org/shards is in the cache, and ")
    assert same(besa.load("org/shards"), besa.load(folders["first"]))


def test_a_moved_repository_is_followed(
    hub: LoopbackHub, commits: tuple[str, str], folders: dict[str, Path], tmp_path: Path
) -> None:
    hub.moved["former/name"] = "org/model"
    record = besa.compress("former/name@v1", "magnitude", out=tmp_path / "out", **SMALL).record
    assert (record.model["source"], record.model["revision"]) == ("former/name", commits[0])
    assert same(besa.load("former/name"), besa.load(folders["second"]))


def test_a_private_repository_needs_a_token_which_no_other_host_sees(
    hub: LoopbackHub, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/secret", folders["first"], private=True)
    hub.add("org/gated", folders["second"], gated=True)
    hub.tokens = {"hf_reader": {"org/secret", "org/gated"}, "hf_other": set()}
    missing = "There is no folder {}, and no model of this name on the Hugging Face Hub that you may read: check the "
    missing += "name, and if it is private, log in with `hf auth login`."
    gated = f"org/gated is gated: accept its licence at {hub.url}/org/gated, and log in with `hf auth login`."
    for token in (None, "hf_other"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        for call in (besa.load, besa.plan):
            assert refused(lambda call=call: call("org/secret")) == missing.format("org/secret")
            assert refused(lambda call=call: call("org/gated")) == gated
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert same(besa.load("org/secret"), besa.load(folders["first"]))
    assert same(besa.load("org/gated"), besa.load(folders["second"]))
    large = [each for each in hub.requests if each.path.startswith("/files/")]
    assert len(large) == 2
    assert not any("authorization" in each.headers for each in large)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert refused(lambda: besa.load("org/new")) == (
        "The Hugging Face Hub does not know your token: log in with `hf auth login`."
    )


@pytest.mark.parametrize("call", [besa.load, besa.plan])
def test_what_the_hub_does_not_have_is_said(
    call: Callable[[str], object], hub: LoopbackHub, commits: tuple[str, str], folders: dict[str, Path]
) -> None:
    hub.add("org/bare", folders["first"], without=["config.json"])
    assert refused(lambda: call("org/other")).startswith("There is no folder org/other, and no model of this name on ")
    assert refused(lambda: call("nobody@v1")).startswith("There is no folder nobody, and no model of this name on ")
    assert refused(lambda: call("org/model@v2")) == (
        "org/model has no revision v2: name one of its branches, tags or commits."
    )
    absent = "0" * 40
    assert f"org/model has no revision {absent}: " in refused(lambda: call(f"org/model@{absent}"))
    assert refused(lambda: call("org/bare")) == (
        "org/bare has no config.json: name a model in the format of transformers."
    )
    assert refused(lambda: call("a b/c")).startswith("There is no folder a b/c, and it cannot be a Hugging Face id ")


def test_a_repository_without_safetensors_is_refused(hub: LoopbackHub, folders: dict[str, Path]) -> None:
    files = {path.name: Blob(path) for path in folders["first"].iterdir()}
    hub.add("org/pickled", folders["first"])
    hub.repositories["org/pickled"].commit({"pytorch_model.bin": files.pop(WEIGHTS), **files})
    assert refused(lambda: besa.load("org/pickled")) == (
        "org/pickled has no model.safetensors, nor shards with an index: name another model or revision, as besa reads "
        "no pickled weights."
    )
    assert not hub.asked("pytorch_model.bin")


def test_an_adapter_that_the_cache_has_is_refused(
    hub: LoopbackHub, commits: tuple[str, str], folders: dict[str, Path]
) -> None:
    (fetching.fetch("org/model") / "adapter_config.json").write_text("{}")
    assert "holds an adapter too: merge it into the weights, or remove its" in refused(lambda: besa.load("org/model"))


def test_an_answer_that_is_none_is_said(hub: LoopbackHub, commits: tuple[str, str]) -> None:
    hub.failing = {"models/org/model": [503, 403, "<html>Log in to this network</html>"]}
    load = lambda: besa.load("org/model")  # noqa: E731
    assert refused(load) == (
        "org/model is neither a folder here nor in the cache, and the Hugging Face Hub cannot be reached (status 503): "
        "try again when it can."
    )
    assert refused(load).startswith("The Hugging Face Hub refuses org/model (status 403, Internal Error - We're ")
    assert refused(load) == (
        f"{hub.url} does not answer as the Hugging Face Hub does: check HF_ENDPOINT and the proxy."
    )
    expected = load()
    hub.failing = {"models/org/model": [503]}
    assert same(load(), expected)


def test_a_download_that_breaks_off_goes_on(
    hub: LoopbackHub, commits: tuple[str, str], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between attempts
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.broken = {WEIGHTS: [50_000, 70_000]}
    assert same(besa.load("org/model"), besa.load(folders["second"]))
    ranges = [each.headers.get("range") for each in hub.asked(WEIGHTS, "GET")]
    assert ranges == [None, "bytes=50000-", "bytes=120000-"]


def test_a_download_that_cannot_go_on_is_taken_up_by_the_next_run(
    hub: LoopbackHub, commits: tuple[str, str], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between attempts
    hub.add("org/shards", folders["shards"])
    first = sorted(path.name for path in folders["shards"].glob("model-*"))[0]
    hub.broken = {first: [0] * 6}
    text = refused(lambda: besa.load("org/shards"))
    assert text.startswith("The download of org/shards broke off (peer closed connection without sending complete ")
    assert text.endswith("): try again, and it goes on with what is missing.")
    before = len(hub.requests)
    assert same(besa.load("org/shards"), besa.load(folders["first"]))
    again = {each.path.rpartition("/")[2] for each in hub.requests[before:] if each.path.startswith("/files/")}
    assert first in again
    assert "config.json" not in {each.path.rpartition("/")[2] for each in hub.requests[before:]}


def test_a_cache_that_cannot_be_written_is_said_and_one_that_can_be_read_is_enough(
    commits: tuple[str, str], folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "hub"
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(below))
        assert refused(lambda: besa.load("org/model")) == (
            f"The cache of the Hugging Face Hub in {below} cannot be written (Not a directory): set HF_HOME to a "
            "folder that can be."
        )
    besa.load("org/model")

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    shutil.rmtree(Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--org--model" / "trees")
    for name in ("os.makedirs", "pathlib.Path.mkdir", "os.symlink", "tempfile.mkstemp"):
        monkeypatch.setattr(name, read_only)
    assert same(besa.load("org/model"), besa.load(folders["second"]))
    assert "cannot be written (Read-only file system): set HF_HOME" in refused(lambda: besa.load("org/model@v1"))


def test_a_run_goes_on_with_the_commit_that_it_began_with(
    hub: LoopbackHub, folders: dict[str, Path], tmp_path: Path
) -> None:
    first = hub.add("org/model", folders["first"])

    def stop(done: int, _: int, state: str) -> None:
        if done == 1 and state != "embeddings":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        besa.compress("org/model", "magnitude", out=tmp_path / "out", progress=stop, **SMALL)
    second = hub.add("org/model", folders["second"])
    again = {"out": tmp_path / "out", "resume": True, **SMALL}
    text = refused(lambda: besa.compress("org/model", "magnitude", **again))
    assert f"belongs to a run with model.revision = '{first}', not '{second}'" in text
    assert partial_folder(tmp_path / "out").exists()
    record = besa.compress(f"org/model@{first}", "magnitude", **again).record
    assert (record.restored_blocks, record.model["revision"]) == (1, first)
    besa.compress(folders["first"], "magnitude", out=tmp_path / "local", **SMALL)
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "local" / WEIGHTS).read_bytes()


def test_results_of_a_comparison_are_of_one_commit(hub: LoopbackHub, folders: dict[str, Path], tmp_path: Path) -> None:
    def workspace(model: str) -> Workspace:
        measures = Measures((TEXT,), window=16, max_windows=2)
        return Workspace(tmp_path, Conditions(model, TEXT, samples=2, seqlen=16), measures)

    first = hub.add("org/model", folders["first"])
    recipe = besa.Recipe.load("magnitude")
    begun = workspace("org/model")
    assert begun.outcome(None).evaluation.revision == first
    hub.add("org/model", folders["second"])
    record = begun.outcome(recipe).record
    assert record is not None
    assert record.model["revision"] == first
    assert workspace(f"org/model@{first}").done(recipe)
    assert not workspace("org/model").done(recipe)
    assert not workspace("org/model").done(None)


@pytest.mark.parametrize("name", ["smollm2", "none.gguf", "local"])
def test_what_is_no_hugging_face_id_has_no_revisions(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders["first"], "local")
    shutil.copytree(folders["second"], "local@v2")
    text = f"{name} has no revisions, as it is no Hugging Face id: leave out @v1."
    assert refused(lambda: locate(f"{name}@v1")) == text
    assert same(besa.load("local@v2"), besa.load(folders["second"]))
    assert locate("local@v2").local().revision is None
    assert refused(lambda: locate("org/model@")).startswith("org/model@ names no revision: ")
    for path in ("./none@v1", "a/b/c@v1", "~/none@v1"):
        assert "is not a model folder" in refused(lambda path=path: locate(path))


@pytest.mark.slow
def test_a_process_of_its_own_meets_the_hub_by_its_variables(
    hub: LoopbackHub, commits: tuple[str, str], folders: dict[str, Path], tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **hub.environment(tmp_path / "other")}
    command = [sys.executable, "-m", "besa", "inspect", "org/model@v1", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["file_bytes"] == (folders["first"] / WEIGHTS).stat().st_size
    assert (tmp_path / "other" / "hub" / "models--org--model" / "snapshots" / commits[0]).is_dir()


def test_large_models_come_in_shards_and_go_on_as_such(
    hub: LoopbackHub, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "ONE_FILE", 0)
    hub.add("org/shards", folders["shards"])
    besa.compress("org/shards", "magnitude", out=tmp_path / "out", **SMALL)
    found = besa.load(tmp_path / "out").state_dict()
    expected = besa.load(folders["pruned"]).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_whatever_takes_a_model_takes_a_revision(
    commits: tuple[str, str], folders: dict[str, Path], tmp_path: Path
) -> None:
    id, folder = f"org/model@{commits[0][:10]}", folders["first"]
    told = [besa.generate(model, "The city", max_new_tokens=4) for model in (id, folder, folders["second"])]
    assert told[0] == told[1] != told[2]
    assert besa.simulate(id, [1]).linears == besa.simulate(folder, [1]).linears
    command = ["plan", id, "--passes", "16", "--recipe", "best", "--json", str(tmp_path / "plan.json")]
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = besa.plan(folder, spending(besa.Recipe.load("best"), 16, 128, 64, head_share(model, find_blocks(model))))
    assert json.loads((tmp_path / "plan.json").read_text())["forward_passes"] == expected.forward_passes
    arguments = ["--recipes", "magnitude", "--ppl", TEXT, "--max-windows", "2", "--calibration", TEXT, "--samples", "2"]
    for model, out in ((id, "hub"), (folder, "local")):
        command = ["compare", str(model), "--out", str(tmp_path / out), *arguments]
        assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    found, made = (json.loads((tmp_path / out / "compare.json").read_text()) for out in ("hub", "local"))
    assert found["conditions"] == made["conditions"]  # by what is in the files
    assert [row["mean"] for row in (found["dense"], *found["rows"])] == [
        row["mean"] for row in (made["dense"], *made["rows"])
    ]


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models' code goes to a folder of the test; python forgets the package afterwards, as it keeps where it was."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    forget()
    yield
    forget()


@pytest.mark.usefixtures("own_modules")
def test_code_of_a_repository_runs_if_it_is_trusted_and_as_its_commit_has_it(
    hub: LoopbackHub, folders: dict[str, Path], tmp_path: Path
) -> None:
    commits = []
    for version in ("first", "second"):
        folder = tmp_path / version
        shutil.copytree(folders[version], folder)
        (folder / "modeling_own.py").write_text(
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
            f"class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n    version = '{version}'\n"
        )
        places = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
        config = json.loads((folder / "config.json").read_text()) | {"model_type": "own", "auto_map": places}
        (folder / "config.json").write_text(json.dumps(config))
        commits.append(hub.add("org/own", folder))
    for call in (besa.load, besa.plan):
        text = refused(lambda call=call: call("org/own"))
        assert text.startswith("Model org/own cannot be read: it needs model code of its own; pass --trust-remote-code")
    for version, revision in (("second", ""), ("first", f"@{commits[0]}"), ("second", "@main")):
        model = besa.load(f"org/own{revision}", trust_remote_code=True)
        assert model.version == version
        assert same(model, besa.load(folders[version]))
