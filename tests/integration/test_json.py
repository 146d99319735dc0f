"""--json and exit codes are the same everywhere."""

import json
from pathlib import Path

import pytest
import typer

from besa.cli import app
from besa.errors import BesaError
from tests.calling import called

COMMANDS = typer.main.get_command(app).commands
TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
TEXT = TINY / "calibration.txt"
SMALL = ["--calibration", TEXT, "--samples", "2", "--seqlen", "16"]
MEASURED = ["--window", "16", "--max-windows", "2"]
NO_RESULT = {"unpack", "report", "generate"}  # they write a checkpoint, a page and words
SHORT = {"plan", "recipes", "doctor", "report"}  # have no progress


def test_every_command_with_a_result_gives_it_as_json_and_every_long_one_can_be_quiet() -> None:
    options = {name: {option for each in command.params for option in each.opts} for name, command in COMMANDS.items()}
    assert {name for name, own in options.items() if "--json" not in own} == NO_RESULT
    assert {name for name, own in options.items() if "--quiet" not in own} == SHORT
    assert {name for name, own in options.items() if "--json-progress" not in own} == SHORT | {"generate"}


def test_help_is_whole_in_eighty_columns_and_speaks_of_its_own_command() -> None:
    helps = {(name, each.name): each.help or "" for name, command in COMMANDS.items() for each in command.params
             if isinstance(each, typer.core.TyperOption)}  # fmt: skip
    assert max(len(word) for text in helps.values() for word in text.split()) < 35
    assert helps["prune", "bos"].startswith("Begin calibration sequences with")
    assert helps["eval", "bos"].startswith("Begin windows with")
    assert helps["compare", "bos"].startswith("Begin calibration sequences and windows with")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A pruned model, and what the command said of it."""
    out = tmp_path_factory.mktemp("json") / "out"
    made = called("prune", TINY, out, "--recipe", "magnitude", *SMALL, "--json", "-", "--quiet")
    assert (made.returncode, made.stderr) == (0, "")
    return out, json.loads(made.stdout)


def test_prune_gives_its_record(pruned: tuple[Path, dict]) -> None:
    out, said = pruned
    record = json.loads((out / "besa_run.json").read_text())
    assert said["blocks"] == record["blocks"]
    assert said["recipe"] == record["recipe"]


def test_dash_prints_json_alone_and_a_file_gets_the_same(pruned: tuple[Path, dict], tmp_path: Path) -> None:
    out, _ = pruned
    heldout = TINY / "heldout.txt"
    for command, key in [
        (["inspect", out], "linears"),
        (["verify", out], "bytes"),
        (["plan", TINY, *SMALL], "forward_passes"),
        (["simulate", out, "--tokens", "1"], "kinds"),
        (["eval", out, "--ppl", f"wiki,{heldout}", *MEASURED], "perplexity"),
    ]:  # fmt: skip
        printed = called(*command, "--json", "-", folder=tmp_path)
        assert (printed.returncode, printed.stderr) == (0, ""), command
        result = json.loads(printed.stdout)
        assert key in result
        assert list(tmp_path.iterdir()) == []
        if key == "perplexity":
            assert result["pruned"] == json.loads((out / "besa_run.json").read_text())["created"]
    shown = called("inspect", out, "--json", "result.json", folder=tmp_path)
    assert "sparsity of the prunable weights" in shown.stdout
    printed = called("inspect", out, "--json", "-").stdout
    assert (tmp_path / "result.json").read_text() == printed
    assert called("pack", out, tmp_path / "packed", "--json", "-").stdout.startswith("{\n")


def test_texts_and_tasks_are_given_by_commas_or_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_comma = tmp_path / "one,two.txt"
    with_comma.write_text(TEXT.read_text()[:5000])
    (tmp_path / "three.txt").write_text(TEXT.read_text()[:5000])
    made = called(
        "eval", TINY, "--ppl", f"three.txt,{TEXT}", "--ppl", "one,two.txt", *MEASURED, "--json", "-", folder=tmp_path
    )
    assert made.returncode == 0, made.stderr
    assert list(json.loads(made.stdout)["perplexity"]) == ["three", "calibration", "one,two"]
    for tasks in (["--tasks", "piqa,none"], ["--tasks", "piqa", "--tasks", "none"]):
        refused = called("eval", TINY, *tasks)
        assert refused.returncode == 2
        assert "none" in refused.stderr
    refused = called(
        "compare", TINY, "--recipes", "wanda", "--tasks", "piqa", "--tasks", "none", *SMALL, folder=tmp_path
    )
    assert refused.returncode == 2
    assert "none" in refused.stderr


def test_a_result_that_cannot_be_written_is_shown_all_the_same(
    pruned: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise BesaError(f"The disk is full: {path} was not written; make room and run again.")

    monkeypatch.setattr("besa.storage.writing.write_file", full)
    found = called("inspect", pruned[0], "--json", tmp_path / "result.json")
    assert found.returncode == 2
    assert "The disk is full" in found.stderr
    assert "sparsity of the prunable weights" in found.stdout


def test_exit_codes(tmp_path: Path) -> None:
    assert called("recipes").returncode == 0
    assert called("recipes", "--none").returncode == 2
    assert called("inspect", tmp_path).returncode == 2
    assert called("recipes", "--json", "/").returncode == 2
