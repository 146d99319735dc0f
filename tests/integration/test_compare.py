"""Recipes side by side: what is missing is run, what is there is used, and table and plot are of these runs."""

import io
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from xml.etree import ElementTree

import pytest
from rich.console import Console

import besa
from besa.cli.show.studying import compared
from besa.errors import BesaError, Interrupted, Notice
from besa.evaluation.result import Evaluation
from besa.methods.recipe import Recipe
from besa.report import load_run
from besa.storage.writing import claimed
from besa.studies import workspace as workspace_module
from besa.studies.comparing import Comparison, compare
from besa.studies.origin import Origin
from besa.studies.rows import footnotes
from besa.studies.workspace import Conditions, Measures, Workspace
from tests.calling import called
from tests.measuring_on_ranks import with_tiny_questions

RECIPES, SPARSITIES = ["magnitude", "wanda"], [0.5, 0.7]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, shallow_llama_folder: Path) -> str:
    """Little to read, as most of the time of runs this small is reading."""
    path = tmp_path_factory.mktemp("texts") / "little.txt"
    path.write_text((shallow_llama_folder / "calibration.txt").read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return str(path)


def workspace_in(folder: Path, model: Path, text: str) -> Workspace:
    measures = Measures((str(model / "heldout.txt"), text), window=32, max_windows=4)
    return Workspace(folder, Conditions(str(model), text, samples=4, seqlen=32), measures)


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, shallow_llama_folder: Path, text: str
) -> tuple[Workspace, Comparison]:
    workspace = workspace_in(tmp_path_factory.mktemp("compare"), shallow_llama_folder, text)
    return workspace, compare(workspace, RECIPES, SPARSITIES, 2, ["besa", "compare"])


def lines_of(folder: Path) -> list[str]:
    """The lines of a table."""
    return [line for line in (folder / "compare.md").read_text().splitlines() if line.startswith("|")]


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compress", "evaluate"):
        monkeypatch.setattr(workspace_module, name, lambda *_, **__: pytest.fail("it was run again"))


def test_rows_are_the_runs_that_were_made(
    made: tuple[Workspace, Comparison], shallow_llama_folder: Path, text: str
) -> None:
    workspace, found = made
    assert [(row.recipe, round(row.sparsity, 3)) for row in found.rows] == [
        (recipe, sparsity) for sparsity in SPARSITIES for recipe in RECIPES
    ]
    row = found.rows[3]
    by_hand = []
    for seed in range(2):
        result = besa.compress(shallow_llama_folder, "wanda", text, sparsity=0.7, samples=4, seqlen=32, seed=seed)
        measured = besa.evaluate(
            result.model, workspace.measures.texts, window=32, max_windows=4, tokenizer=result.tokenizer
        )
        by_hand.append(measured.perplexity["heldout"])
    assert row.values["heldout"] == pytest.approx(by_hand, rel=1e-5)
    assert by_hand[0] != by_hand[1]
    assert row.mean["heldout"] == pytest.approx(mean(by_hand), rel=1e-5)
    assert row.spread["heldout"] == pytest.approx(stdev(by_hand), rel=1e-2)
    assert found.dense.spread == {}


def test_the_folder_holds_records_and_no_weights(made: tuple[Workspace, Comparison]) -> None:
    workspace, _ = made
    names = sorted(path.name for path in workspace.folder.iterdir())
    assert sum(name.endswith(".run.json") for name in names) == 8
    assert sum(name.startswith("wanda-0.7-seed1-") for name in names) == 3
    assert sum(".heldout-" in name for name in names) == sum(".little-" in name for name in names) == 9
    assert [name for name in names if not name.endswith(".json")] == ["besa.lock", "compare.md", "compare.svg"]


def test_nothing_is_run_twice(made: tuple[Workspace, Comparison], nothing_runs: None) -> None:
    workspace, found = made
    again = compare(workspace, ["wanda"], [0.7], 1)
    assert again.rows == found.rows  # and one with more seeds keeps them


@pytest.mark.parametrize(
    "change",
    [
        lambda w: replace(w, conditions=replace(w.conditions, samples=3)),
        lambda w: replace(w, conditions=replace(w.conditions, dtype="bfloat16")),
        lambda w: replace(w, conditions=replace(w.conditions, calibration="c4")),
        lambda w: replace(w, measures=replace(w.measures, max_windows=3)),
        lambda w: replace(w, measures=replace(w.measures, texts=w.measures.texts[:1])),
    ],
)
def test_whatever_decides_a_result_is_in_its_key(made: tuple[Workspace, Comparison], change) -> None:
    workspace, _ = made
    recipe = Recipe.load("wanda", 0.7)
    keys = {w.key(recipe, 0) + str([w._name(one) for one in w.measures.each()]) for w in (workspace, change(workspace))}
    assert len(keys) == 2


def test_keys_know_recipes_seeds_and_contents(made: tuple[Workspace, Comparison], tmp_path: Path, text: str) -> None:
    workspace, _ = made
    recipe = Recipe.load("wanda", 0.7)
    key = workspace.key(recipe, 0)
    assert re.fullmatch(r"wanda-0\.7-seed0-[0-9a-f]{10}", key)
    others = [workspace.key(recipe, 1), workspace.key(Recipe.load("wanda", 0.7, ["skip=['*.k_proj']"]), 0)]
    assert len({key, *others}) == 3
    copy = tmp_path / "another name.txt"
    copy.write_text(Path(text).read_text())
    moved = replace(workspace, conditions=replace(workspace.conditions, calibration=str(copy)))
    same = moved.key(recipe, 0)
    copy.write_text(Path(text).read_text() + ".")
    assert moved.key(recipe, 0) != same


def test_a_file_does_not_stand_for_an_embedded_text_of_its_name(
    made: tuple[Workspace, Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = replace(
        made[0],
        conditions=replace(made[0].conditions, calibration="c4:0.5,code:0.5"),
        measures=replace(made[0].measures, texts=("wiki", "web")),
    )
    keys = []
    for content in ("", "hello"):
        for name in ("c4", "wiki", "web") if content else ():
            Path(name).write_text(content)
        keys.append((one.key(Recipe.load("wanda", 0.7), 0), [one._name(each) for each in one.measures.each()]))
    assert keys[0] == keys[1]


def test_another_evaluation_prunes_anew_only_where_weights_are_gone(
    tmp_path: Path, shallow_llama_folder: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = replace(workspace_in(tmp_path, shallow_llama_folder, text), keep=True)
    recipe = Recipe.load("magnitude", 0.5)
    first = workspace.outcome(recipe)
    assert (tmp_path / workspace.key(recipe, 0) / "model.safetensors").exists()
    monkeypatch.setattr(workspace_module, "compress", lambda *_, **__: pytest.fail("it was pruned again"))
    other = replace(workspace, measures=replace(workspace.measures, max_windows=2)).outcome(recipe)
    assert other.record == first.record
    assert other.scores.keys() == first.scores.keys()
    assert all(other.scores[text] != first.scores[text] for text in first.scores)
    one = replace(workspace, measures=workspace.measures.only([text]))
    monkeypatch.setattr(workspace_module, "evaluate", lambda *_, **__: pytest.fail("it was measured again"))
    assert one.outcome(recipe).scores == {"little": first.scores["little"]}
    assert replace(workspace, measures=Measures()).outcome(recipe).scores == {}


def test_weights_that_are_to_be_kept_are_pruned_anew_where_they_are_gone(
    tmp_path: Path, shallow_llama_folder: Path, text: str
) -> None:
    workspace, recipe = workspace_in(tmp_path, shallow_llama_folder, text), Recipe.load("magnitude", 0.5)
    first = workspace.outcome(recipe)
    assert not workspace.checkpoint(recipe).exists()
    again = replace(workspace, keep=True).outcome(recipe)
    assert (workspace.checkpoint(recipe) / "model.safetensors").exists()
    assert again.scores == first.scores


def test_weights_pruned_anew_are_measured_anew(
    tmp_path: Path, shallow_llama_folder: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, recipe = workspace_in(tmp_path, shallow_llama_folder, text), Recipe.load("magnitude", 0.5)
    first = workspace.outcome(recipe)
    kept = replace(workspace, keep=True)
    assert not kept.done(recipe)
    again, folder = kept.outcome(recipe), workspace.checkpoint(recipe)
    assert again.record.created != first.record.created
    assert {measured.pruned for measured in again.evaluations} == {again.record.created}
    assert load_run(folder).measured == again.evaluation
    assert f"{again.scores['heldout']:,.2f}" in (folder / "README.md").read_text()
    assert kept.done(recipe)
    shutil.rmtree(folder)
    monkeypatch.setattr(workspace_module, "compress", lambda *_, **__: pytest.fail("it was pruned for nothing"))
    assert workspace.outcome(recipe).scores == first.scores


def test_an_interrupted_run_goes_on(tmp_path: Path, shallow_llama_folder: Path, text: str) -> None:
    def stop(done: float, total: float, note: str = "") -> None:
        if done == 2 and "error" in note:
            raise KeyboardInterrupt

    workspace = workspace_in(tmp_path, shallow_llama_folder, text)
    recipe = Recipe.load("wanda", 0.5)
    with pytest.raises(Interrupted, match=r"what was finished is kept in .*: the same command goes on\."):
        replace(workspace, progress=stop).outcome(recipe)
    outcome = workspace.outcome(recipe)
    assert outcome.record is not None
    assert outcome.record.restored_blocks == 2


def test_weights_of_a_stopped_command_do_not_stay(
    tmp_path: Path, shallow_llama_folder: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, recipe = workspace_in(tmp_path, shallow_llama_folder, text), Recipe.load("magnitude", 0.5)

    def stopped(keep: bool) -> None:
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match="the same command goes on"):
            patch.setattr(workspace_module, "evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            replace(workspace, keep=keep).outcome(recipe)
        assert workspace.checkpoint(recipe).exists()

    stopped(keep=False)
    workspace.outcome(recipe)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".json"] == []
    for path in tmp_path.iterdir():
        path.unlink()
    stopped(keep=False)
    stopped(keep=True)  # these are to stay
    workspace.outcome(recipe)
    assert workspace.checkpoint(recipe).exists()


def test_what_stopped_commands_left_is_named_and_stays(
    tmp_path: Path, shallow_llama_folder: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = workspace_in(tmp_path, shallow_llama_folder, text)

    def stop(done: float, total: float, note: str = "") -> None:
        if done == 2 and "error" in note:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        compare(replace(workspace, progress=stop), ["wanda"], [0.5], 1)
    (partial,) = tmp_path.glob("wanda-*.partial")
    lost = workspace.key(Recipe.load("wanda", 0.6), 0)
    for name in (f"{lost}.passing", "mine.passing"):
        (tmp_path / name).touch()
    (tmp_path / "mine.partial").mkdir()
    with pytest.warns(Notice) as heard:
        compare(workspace, ["magnitude"], [0.5], 1)
    (said,) = (str(one.message) for one in heard if "stopped commands" in str(one.message))
    assert re.sub(r"\(\d\.\d MB\)", "(N MB)", said) == (
        f"{tmp_path} has what stopped commands left: {partial.name} (N MB). The same commands go on with it; if nobody "
        "will give them, remove it."
    )
    assert not (tmp_path / f"{lost}.passing").exists()  # of nothing that is there
    assert (tmp_path / "mine.passing").exists()
    assert compare(workspace, ["wanda"], [0.5], 1).rows[1].recipe == "wanda"
    left = sorted(path.name for path in tmp_path.iterdir() if path.suffix in (".partial", ".passing"))
    assert left == ["mine.partial", "mine.passing"]


def test_table_plot_and_json_agree(made: tuple[Workspace, Comparison]) -> None:
    workspace, found = made
    written = Comparison.model_validate_json((workspace.folder / "compare.json").read_text())
    assert written.rows == found.rows
    table = lines_of(workspace.folder)
    assert table[0] == "| recipe | sparsity | heldout | little | seconds |"
    assert table[2].startswith(f"| dense | 0.0000% | {found.dense.mean['heldout']:.2f} |")
    row = found.rows[0]
    assert f"| {row.mean['heldout']:,.2f} ± {row.spread['heldout']:,.2f} |" in table[3]
    root = ElementTree.parse(workspace.folder / "compare.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("viewBox") == f"0 0 {root.get('width')} {root.get('height')}"
    text = "".join(root.itertext())
    for word in ("magnitude", "wanda", "dense", "perplexity heldout", "perplexity little", "sparsity in %"):
        assert word in text
    assert "var(" not in (workspace.folder / "compare.svg").read_text()


def test_the_table_says_what_it_was_made_under_and_what_a_reader_should_know(
    made: tuple[Workspace, Comparison], nothing_runs: None
) -> None:
    workspace, found = made
    document = (workspace.folder / "compare.md").read_text()
    basis = f"alibrated on 4 × 32 tokens of {workspace.conditions.calibration}; perplexity in windows of 32 tokens"
    assert document.startswith(
        f"# Recipes on {workspace.conditions.model}\n\nC{basis}, 4 of each text at most. Made by besa "
    )
    note = "The model was calibrated on documents of little: other texts tell more of what is left."
    assert found.rows[0].notes == [note]
    assert document.endswith(f"\n\n- magnitude, wanda: {note}\n")
    again = compare(workspace, ["wanda"], [0.7], 1)  # from what is kept
    shown = Console(width=300, record=True, file=io.StringIO())
    shown.print(compared(again, workspace.folder))
    text = shown.export_text()
    assert f"magnitude, wanda: {note}" in text
    assert f"c{basis}, 4 of each text at most" in " ".join(text.split())


def test_a_note_names_the_rows_that_it_holds_of(made: tuple[Workspace, Comparison]) -> None:
    first, *others = (row.model_copy(update={"notes": []}) for row in made[1].rows)
    noted = first.model_copy(update={"notes": ["Beware."]})
    assert footnotes([noted, *others]) == [f"magnitude at {first.sparsity:.4%}: Beware."]
    assert footnotes([first, *others]) == []


def test_each_recipe_has_its_own_sparsity_unless_one_is_given(
    tmp_path: Path, shallow_llama_folder: Path, text: str
) -> None:
    (mine := tmp_path / "mine.yaml").write_text("name: mine\nsparsity: 0.7\nimportance: {method: magnitude}")
    (none := tmp_path / "none.yaml").write_text("name: none\nsparsity: 0\nimportance: {method: magnitude}")
    workspace = workspace_in(tmp_path / "out", shallow_llama_folder, text)
    result = called(
        "compare", shallow_llama_folder, "--recipes", f"{mine},{none},magnitude", "--out", workspace.folder,
        "--calibration", text, "--samples", "4", "--seqlen", "32", "--ppl", text, "--window", "32",
        "--max-windows", "4", "--json", "-", "--quiet",
    )  # fmt: skip
    found = Comparison.model_validate_json(result.stdout)
    assert [(row.recipe, round(row.sparsity, 3)) for row in found.rows] == [
        ("none", 0.0), ("magnitude", 0.5), ("mine", 0.7)
    ]  # fmt: skip


def test_a_model_that_has_zeros_already_is_not_called_dense(
    tmp_path: Path, shallow_llama_folder: Path, text: str
) -> None:
    besa.compress(shallow_llama_folder, "magnitude", text, out=tmp_path / "half", samples=2, seqlen=16)
    workspace = workspace_in(tmp_path / "out", tmp_path / "half", text)
    workspace = replace(workspace, measures=workspace.measures.only([text]))
    found = compare(workspace, ["magnitude"], [0.7], 1)
    assert (found.dense.recipe, round(found.dense.sparsity, 3)) == ("as given", 0.5)
    assert lines_of(workspace.folder)[2].startswith(f"| as given | {found.dense.sparsity:.4%} |")
    assert "as given" in (workspace.folder / "compare.svg").read_text()


def test_what_was_measured_of_kept_weights_is_beside_them(
    tmp_path: Path, shallow_llama_folder: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, recipe = workspace_in(tmp_path, shallow_llama_folder, text), Recipe.load("magnitude", 0.5)
    workspace = replace(workspace, keep=True)
    measured = workspace.outcome(recipe).evaluation
    folder = workspace.checkpoint(recipe)
    assert Evaluation.read(folder / "besa_eval.json") == measured
    card = (folder / "README.md").read_text()
    assert f"{measured.perplexity['heldout']:,.2f}" in card
    (folder / "besa_eval.json").unlink()  # as of a besa that kept none
    monkeypatch.setattr(workspace_module, "evaluate", lambda *_, **__: pytest.fail("it was measured again"))
    workspace.outcome(recipe)
    assert Evaluation.read(folder / "besa_eval.json") == measured
    assert besa.verify(folder).files


def test_accuracies_are_paired_with_those_of_the_dense_model(
    tmp_path: Path, shallow_llama_folder: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_tiny_questions(tmp_path, monkeypatch.setattr)
    measures = Measures(tasks=("piqa", "winogrande"))
    workspace = replace(workspace_in(tmp_path / "out", shallow_llama_folder, text), measures=measures)
    found = compare(workspace, ["wanda"], [0.7], 2)
    reference, *models = (
        workspace.outcome(recipe, seed).evaluation.zero_shot.tasks
        for recipe, seed in [(None, 0), (Recipe.load("wanda", 0.7), 0), (Recipe.load("wanda", 0.7), 1)]
    )
    pairs, mean_pair = found.rows[0].paired.tasks, found.rows[0].paired.mean
    for task in measures.tasks:
        dense, *runs = ([*map(int, one[task].right)] for one in (reference, *models))
        changes = [(first + second) / 2 - right for first, second, right in zip(*runs, dense, strict=True)]
        assert pairs[task].difference == pytest.approx(mean(changes))
        assert pairs[task].stderr == pytest.approx(stdev(changes) / len(changes) ** 0.5)
        assert pairs[task].won - pairs[task].lost == 2 * sum(changes)
    assert any(pair.won + pair.lost for pair in pairs.values())
    assert 100 * mean_pair.difference == pytest.approx(found.rows[0].mean["accuracy"] - found.dense.mean["accuracy"])
    assert mean_pair.answers == 2 * 2 * 6
    assert found.dense.paired is None
    assert Comparison.model_validate_json((workspace.folder / "compare.json").read_text()).rows == found.rows
    document = (workspace.folder / "compare.md").read_text()
    assert "| recipe | sparsity | piqa | winogrande | mean | won | lost | of |" in document
    said = f"{100 * mean_pair.difference:+.2f} ± {100 * mean_pair.stderr:.2f}"
    assert f"| {said} | {mean_pair.won} | {mean_pair.lost} | 24 |" in document
    shown = Console(width=200, record=True, file=io.StringIO())
    shown.print(compared(found, workspace.folder))
    terminal = shown.export_text()
    assert said in terminal
    assert "on the same questions, in points" in terminal


def test_without_answers_there_is_no_pairing(
    tmp_path: Path, shallow_llama_folder: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of before answers were kept."""
    with_tiny_questions(tmp_path, monkeypatch.setattr)
    given = workspace_in(tmp_path / "out", shallow_llama_folder, text)
    workspace = replace(given, measures=Measures(tasks=("piqa",)))
    compare(workspace, ["magnitude"], [0.5], 1)
    (path,) = workspace.folder.glob("dense.zero-shot-*.json")
    content = json.loads(path.read_text())
    for key in ("right", "right_norm", "asked"):
        del content["zero_shot"]["tasks"]["piqa"][key]
    path.write_text(json.dumps(content))
    found = compare(workspace, ["magnitude"], [0.5], 1)
    assert found.rows[0].paired is None
    assert "same questions" not in (workspace.folder / "compare.md").read_text()


@pytest.mark.parametrize("lost", ["heldout", "zero-shot"])
def test_texts_are_measured_without_tasks_and_tasks_without_texts(
    lost: str, tmp_path: Path, shallow_llama_folder: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the other results are there, and with the same numbers, in the same file."""
    with_tiny_questions(tmp_path, monkeypatch.setattr)
    given = workspace_in(tmp_path / "out", shallow_llama_folder, text)
    workspace = replace(given, measures=replace(given.measures, tasks=("piqa",), limit=3))
    first = workspace.outcome(None).evaluation
    (path,) = workspace.folder.glob(f"dense.{lost}-*.json")
    path.unlink()
    again = workspace.outcome(None).evaluation
    assert path.exists()
    assert (again.details, again.zero_shot, again.window) == (first.details, first.zero_shot, 32)


def copied(workspace: Workspace, folder: Path) -> Workspace:
    return replace(workspace, folder=shutil.copytree(workspace.folder, folder / "copy"))


def test_another_comparison_adds_its_rows_to_the_table(made: tuple[Workspace, Comparison], tmp_path: Path) -> None:
    workspace, found = made
    workspace = copied(workspace, tmp_path)
    (mine := tmp_path / "mine.yaml").write_text("name: mine\nimportance: {method: magnitude}")
    more = compare(workspace, [str(mine)], [0.6], 1)
    assert [row for row in more.rows if row.recipe != "mine"] == found.rows
    assert [(row.recipe, row.seeds) for row in more.rows] == [
        ("magnitude", 2), ("wanda", 2), ("mine", 1), ("magnitude", 2), ("wanda", 2)
    ]  # fmt: skip
    table = lines_of(workspace.folder)
    assert [line.split()[1] for line in table[2:]] == ["dense", *(row.recipe for row in more.rows)]
    before = {path.name: path.read_bytes() for path in workspace.folder.iterdir()}
    mine.write_text("name: mine\nimportance: {method: obs}")
    with pytest.raises(BesaError, match="another recipe named mine: give each its own name"):
        compare(workspace, [str(mine)], [0.6], 1)
    assert {path.name: path.read_bytes() for path in workspace.folder.iterdir()} == before


def test_a_recipe_that_learns_is_the_same_when_it_is_asked_for_again(
    shallow_llama_folder: Path, tmp_path: Path, text: str
) -> None:
    """Its record has numbers where the recipe has `auto`."""
    (few := tmp_path / "few.yaml").write_text("name: few\nallocation: {method: besa, steps: 1}")
    workspace = workspace_in(tmp_path / "out", shallow_llama_folder, text)
    first = compare(workspace, [str(few)], [0.5], 1)
    assert compare(workspace, [str(few)], [0.5], 1).rows == first.rows


def of_another(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """As if another besa, or the same on another machine, went on."""
    here = Origin.here("cpu")
    parts = {name: getattr(here, name) | change for name, change in changes.items()}
    monkeypatch.setattr(Origin, "here", lambda device: here.model_copy(update=parts))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"versions": {"besa": "9.9.9"}}, "besa 9.9.9"),
        pytest.param({"versions": {"torch": "9.9"}}, "torch 9.9", marks=pytest.mark.slow),
        pytest.param({"machine": {"processor": "Another"}}, "on Another", marks=pytest.mark.slow),
        ({"machine": {"threads": 99}}, "99 threads"),
        pytest.param({"machine": {"gpu": "A GPU"}}, "on A GPU", marks=pytest.mark.slow),
    ],
)
def test_rows_of_another_besa_or_machine_are_shown_as_such_and_made_anew(
    made: tuple[Workspace, Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes, words: str
) -> None:
    workspace = copied(made[0], tmp_path)
    own = compare(workspace, ["wanda"], [0.7], 1)
    pruned, compress = [], workspace_module.compress
    monkeypatch.setattr(workspace_module, "compress", lambda *a, **k: pruned.append(a) or compress(*a, **k))
    with monkeypatch.context() as patch:
        of_another(patch, **changes)
        workspace = replace(workspace)  # as a new process has it
        found = compare(workspace, ["wanda"], [0.7], 1)
        assert words in workspace.origin.label
    assert len(pruned) == 1
    assert [(row.recipe, row.origin) for row in found.rows] == [("wanda", workspace.origin)]
    assert found.dense.origin == workspace.origin
    assert found.earlier == [own.dense, *own.rows]
    head, _, *lines = lines_of(workspace.folder)
    assert head.startswith("| recipe | made by | sparsity |")
    assert [line.split("|")[2].strip() for line in lines] == ["", "", *[own.dense.origin.label] * 5]
    back = compare(replace(workspace), ["wanda"], [0.7], 1)
    assert len(pruned) == 1
    assert back.rows == own.rows
    assert back.earlier == [found.dense, *found.rows]


def test_rows_of_before_versions_were_kept_are_shown_as_old(
    made: tuple[Workspace, Comparison], tmp_path: Path, nothing_runs: None
) -> None:
    workspace = copied(made[0], tmp_path)
    path = workspace.folder / "compare.json"
    content = json.loads(path.read_text())
    for row in (content["dense"], *content["rows"]):
        del row["origin"]
    path.write_text(json.dumps(content))
    found = compare(workspace, ["wanda"], [0.7], 2)
    assert [row.recipe for row in found.rows] == ["wanda"]
    assert len(found.earlier) == 5
    assert (workspace.folder / "compare.md").read_text().count("| an earlier besa |") == 5


def test_a_table_of_other_conditions_is_not_written_over(
    made: tuple[Workspace, Comparison], tmp_path: Path, nothing_runs: None
) -> None:
    workspace = copied(made[0], tmp_path)
    before = (workspace.folder / "compare.json").read_bytes()
    wider = replace(workspace, measures=replace(workspace.measures, window=16))
    with pytest.raises(BesaError, match=r"was made under other conditions \(window\): choose another --out"):
        compare(wider, ["wanda"], [0.5], 1)
    assert (workspace.folder / "compare.json").read_bytes() == before
    (workspace.folder / "compare.json").write_text("{}")
    with pytest.raises(BesaError, match="is no table that rows can be added to"):
        compare(workspace, ["wanda"], [0.5], 1)


def test_two_at_once_in_one_folder_do_not_meet(made: tuple[Workspace, Comparison], nothing_runs: None) -> None:
    workspace, _ = made
    with (
        claimed(workspace.folder, workspace.folder),
        pytest.raises(BesaError, match=f"Another besa process is writing {workspace.folder}"),
    ):
        compare(workspace, ["wanda"], [0.5], 1)


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "nul\\0", "x" * 300, ".hidden", "-dash"])
def test_names_of_recipes_lead_nowhere(
    tmp_path: Path, shallow_llama_folder: Path, text: str, nothing_runs: None, name: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(f'name: "{name}"')
    workspace = workspace_in(tmp_path / "a" / "b" / "out", shallow_llama_folder, text)
    with pytest.raises(BesaError, match="is not plain"):
        compare(workspace, [str(tmp_path / "recipe.yaml")], [0.5], 1)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_files_of_evaluations_have_plain_names(made: tuple[Workspace, Comparison], tmp_path: Path) -> None:
    for source in ("hf:../../x", str(tmp_path / ("x" * 250)), str(tmp_path / "ü\n.txt")):
        assert re.fullmatch(r"[\w.-]{1,80}", made[0]._name(Measures((source,))), re.ASCII)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: replace(w, conditions=replace(w.conditions, calibration="none.txt")), "none.txt"),
        (lambda w: replace(w, conditions=replace(w.conditions, samples=10**12)), "tokens"),
        (lambda w: replace(w, conditions=replace(w.conditions, device="tpu")), "device tpu"),
        (lambda w: replace(w, measures=replace(w.measures, texts=("none.txt",))), "none.txt"),
        (lambda w: replace(w, measures=replace(w.measures, tasks=("mmlu",))), "mmlu"),
    ],
)
def test_what_would_end_the_work_is_found_before_it(
    tmp_path: Path, shallow_llama_folder: Path, text: str, nothing_runs: None, change, words: str
) -> None:
    workspace = change(workspace_in(tmp_path / "out", shallow_llama_folder, text))
    with pytest.raises(BesaError, match=words):
        compare(workspace, ["wanda"], [0.5], 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("skip: ['*.nothing']", "The skip pattern \\*.nothing matches no prunable weight"),
        ("quantization: {method: minmax, bits: 4, group: 64, clipping: none}", "no whole number of groups of 64"),
        ("distill: {method: kl}\nexperts: {method: frequency, share: 0.5}", "experts"),
    ],
)
def test_a_recipe_that_does_not_suit_the_model_is_found_before_another_is_run(
    tmp_path: Path, shallow_llama_folder: Path, text: str, nothing_runs: None, setting: str, words: str
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(f"name: other\nallocation: {{method: uniform}}\n{setting}\n")
    workspace = workspace_in(tmp_path / "out", shallow_llama_folder, text)
    with pytest.raises(BesaError, match=words):
        compare(workspace, ["wanda", str(other)], [0.5], 1)
    assert not (tmp_path / "out").exists()


def test_a_hopeless_model_leaves_a_gap(made: tuple[Workspace, Comparison]) -> None:
    from besa.studies.comparing import plot
    from besa.studies.rows import markdown

    _, found = made
    broken = found.rows[0].model_copy(update={"mean": {"heldout": math.inf, "little": math.inf}, "spread": {}})
    assert "∞" in markdown([found.dense, broken])
    assert "<svg" in plot(found.model_copy(update={"rows": [broken, *found.rows[1:]]}))


def test_what_cannot_be_compared_is_refused(made: tuple[Workspace, Comparison], tmp_path: Path) -> None:
    workspace, _ = made
    other = tmp_path / "other.yaml"
    other.write_text("name: wanda\nimportance: {method: magnitude}\nallocation: {method: uniform}\n")
    for recipes, sparsities, words in (
        ([], [0.5], "nothing to compare"),
        (["wanda", "besa", "wanda"], [0.5], "^wanda at 0.5 is to be compared twice: name it once.$"),
        (["wanda"], [0.5, 0.7, 0.7], "^wanda at 0.7 is to be compared twice"),
        (["wanda", str(other)], [0.5], "^Two recipes to compare have the name wanda: give each its own"),
        (["wonder"], [0.5], "No recipe wonder"),
        (["wanda"], [1.5], "sparsity"),
    ):
        with pytest.raises(BesaError, match=words):
            compare(workspace, recipes, sparsities, 1)


def test_the_command(tmp_path: Path, made: tuple[Workspace, Comparison], nothing_runs: None) -> None:
    from typer.testing import CliRunner

    from besa.cli import app

    workspace, found = made
    given, measures = workspace.conditions, workspace.measures
    result = CliRunner().invoke(
        app,
        ["compare", given.model, "--recipes", "magnitude,wanda", "--sparsity", "0.5,0.7", "--seeds", "2",
         "--out", str(workspace.folder), "--calibration", given.calibration, "--samples", "4", "--seqlen", "32",
         *(f"--ppl={text}" for text in measures.texts), "--window", "32", "--max-windows", "4"],
        env={"COLUMNS": "200"},
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"{found.rows[3].mean['heldout']:,.2f} ± " in result.output
    command = json.loads((workspace.folder / "compare.json").read_text())["command"]
    assert command[0] == "besa"


def test_files_of_others_in_the_folder_stay(shallow_llama_folder: Path, text: str, tmp_path: Path) -> None:
    names = ["uv.lock", "poetry.lock", "lock", "failed"]
    for name in names:
        (tmp_path / name).write_text("mine")
    compare(workspace_in(tmp_path, shallow_llama_folder, text), ["magnitude"], [0.5], 1)
    assert [(tmp_path / name).read_text() for name in names] == ["mine"] * 4


def test_a_damaged_measurement_can_be_made_again(
    made: tuple[Workspace, Comparison], tmp_path: Path, shallow_llama_folder: Path, text: str
) -> None:
    folder = shutil.copytree(made[0].folder, tmp_path / "compare")
    workspace = workspace_in(folder, shallow_llama_folder, text)
    damaged = next(folder.glob("dense.heldout-*.json"))
    damaged.write_text("")
    with pytest.raises(
        BesaError, match=r"^.*dense\.heldout.* is damaged: remove it, and the same command makes it again"
    ):
        compare(workspace, RECIPES, SPARSITIES, 2)
    damaged.unlink()
    assert compare(workspace, RECIPES, SPARSITIES, 2).dense == made[1].dense


def test_the_table_cannot_be_written_where_the_folder_is(shallow_llama_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "compared"
    result = called("compare", shallow_llama_folder, "--recipes", "wanda", "--out", out, "--json", out)
    assert result.returncode == 2
    assert "is the folder that will be written: choose another name." in result.stderr
    assert not out.exists()
