"""Evaluations, comparisons and plans of two ranks, which torchrun starts once, against those of one process."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import besa
from besa.errors import BesaError
from besa.evaluation.result import Evaluation
from besa.methods.recipe import Recipe
from besa.storage.writing import taken
from besa.studies import workspace as workspace_module
from besa.studies.comparing import Comparison
from besa.studies.origin import Origin
from besa.studies.sharing import check_alike, share_out
from besa.studies.workspace import Conditions, Measures, Workspace
from besa.system import ranks
from tests.measuring_on_ranks import EVALUATE, MODEL, RECIPES, SIZES, call, comparison, recipe, with_tiny_questions
from tests.ranks import started

pytestmark = pytest.mark.slow  # ranks take half a minute; those of `test_several_ranks` are among the fast tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have done what `tests.measuring_on_ranks` says."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "text.txt").write_text((MODEL / "calibration.txt").read_text(encoding="utf-8")[:20_000])
    small = AutoModelForCausalLM.from_pretrained(MODEL, num_hidden_layers=2)
    small.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder / "model")
    started(2, "-m", "tests.measuring_on_ranks", str(folder))
    return folder


def done_by(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_an_evaluation_is_that_of_one_process(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_tiny_questions(tmp_path, monkeypatch.setattr)
    call([*EVALUATE, "--json", str(tmp_path / "eval.json")])
    alone, together = Evaluation.read(tmp_path / "eval.json"), Evaluation.read(folder / "0" / "eval.json")
    assert alone.details["heldout"].windows == 11
    assert alone.zero_shot.tasks.keys() == {"piqa", "arc_easy"}
    assert together.details == alone.details  # to the bit
    assert together.zero_shot == alone.zero_shot
    assert not (folder / "1" / "eval.json").exists()


def test_a_comparison_is_that_of_one_process(folder: Path, tmp_path: Path) -> None:
    call([*comparison(folder / "text.txt"), "--out", str(tmp_path)])
    alone, together = (
        Comparison.model_validate_json((path / "compare.json").read_text()) for path in (tmp_path, folder / "compare")
    )
    for row in (*alone.rows, *together.rows):
        row.seconds = None
    assert together.rows == alone.rows
    assert together.dense == alone.dense
    assert {path.name for path in (folder / "compare").iterdir()} == {path.name for path in tmp_path.iterdir()}
    of_ranks = [one["pruned"] for one in done_by(folder)]
    assert all(of_ranks)
    assert len({*of_ranks[0], *of_ranks[1]}) == len([*of_ranks[0], *of_ranks[1]]) == 4


@pytest.mark.parametrize("name", RECIPES)
def test_ranks_send_as_many_bytes_as_planned(folder: Path, name: str) -> None:
    planned = besa.plan(folder / "model", recipe(name), ranks=2, **SIZES)
    assert planned.traffic_bytes.keys() >= {"statistics", "rank", "measure"}
    for one in done_by(folder):
        for sent in one["sent"][name]:
            assert {phase: size for phase, size in sent.items() if size} == planned.traffic_bytes


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """Of a folder that rank 0 has claimed; the other rank says what this one says, and has no problems."""
    monkeypatch.setattr(ranks, "all_of", lambda thing: [thing, "" if isinstance(thing, str) else thing])
    (tmp_path / "besa.lock").touch()
    return Workspace(tmp_path, Conditions(str(MODEL)), Measures((str(MODEL / "heldout.txt"),)))


RUNS = [(Recipe.load("wanda"), 0), (Recipe.load("wanda"), 1)]


def test_a_failure_ends_all_ranks_with_its_sentence(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fail(self, recipe, seed):
        asked.append(seed)
        raise BesaError("The disk is full.")

    monkeypatch.setattr(Workspace, "outcome", fail)
    with ranks.together(1, 2), pytest.raises(BesaError, match=r"^The disk is full\.$"):
        share_out(workspace, RUNS)
    assert asked == [0]
    assert {path.name for path in workspace.folder.iterdir()} == {"besa.lock", "besa.failed"}
    monkeypatch.setattr(ranks, "all_of", lambda thing: [thing, "The disk is full." if thing == "" else thing])
    with ranks.together(0, 2), pytest.raises(BesaError, match=r"^The disk is full\.$"):
        share_out(workspace, RUNS)
    assert asked == [0]  # another rank begins nothing more
    assert {path.name for path in workspace.folder.iterdir()} == {"besa.lock"}


def test_what_another_rank_works_on_is_left_to_it(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(Workspace, "outcome", lambda self, recipe, seed: asked.append((seed, ranks.count())))
    with taken(workspace.folder / f"{workspace.key(*RUNS[0])}.besa.lock") as mine, ranks.together(0, 2):
        assert mine
        share_out(workspace, RUNS)
    assert asked == [(1, 1)]  # it works by itself


def test_ranks_compute_on_their_own_devices_under_the_same_keys(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, asked = Origin.here("cpu"), []
    monkeypatch.setattr(Origin, "here", lambda device: asked.append(device) or here)
    for name in ("compress", "evaluate"):
        monkeypatch.setattr(workspace_module, name, lambda *_, **given: asked.append(given["device"]) or 1 / 0)
    first = replace(workspace, conditions=replace(workspace.conditions, device="cuda:0"))
    second = replace(first, device="cuda:1")
    assert second.key(*RUNS[0]) == first.key(*RUNS[0])
    assert second.decisive() == first.decisive()
    for one in (None, RUNS[0][0]):
        with pytest.raises(ZeroDivisionError):
            second.outcome(one)
    assert asked == ["cuda:1", "cuda:0", "cuda:1", "cuda:1"]


def test_ranks_that_cannot_work_together_are_refused(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "all_of", lambda thing: [thing, False])
    with pytest.raises(BesaError, match=r"^Rank 1 does not see .*: choose an --out that all machines share\.$"):
        share_out(workspace, RUNS)
    here = Origin.here("cpu")
    other = here.model_dump() | {"machine": here.machine | {"processor": "Another"}}
    monkeypatch.setattr(ranks, "all_of", lambda thing: [thing, thing, other])
    with pytest.raises(BesaError, match=r"^Ranks 0 and 2 would make results that do not compare \(.* on Another"):
        check_alike(here)
