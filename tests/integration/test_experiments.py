"""The paper's experiments: their defaults are the paper's, and each runs, writes its files and judges the trend."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import besa
from besa.checkpoint.inspection import inspect
from besa.data.documents import read_documents
from besa.evaluation import zero_shot
from besa.models.loading import locate
from besa.report.curves import Curve, Panel, curves
from besa.studies.workspace import DENSE, Conditions, Measures, Workspace
from experiments import table3
from experiments.experiment import ERRORS, Experiment, Found, Options, Verdict
from experiments.paper import findings, listed
from experiments.result import Result
from experiments.running import carry_out, planned
from experiments.writing import shown, without_calibration, write
from tests.tiny_questions import rows

ROOT = Path(__file__).parent.parent.parent
NAMES = ("table1", "table2", "table5", "table6", "fig1a", "fig1b", "fig3", "fig4", "fig5")
PAPER = {"sparsity": 0.5, "seeds": 1}
POINTS = {"fig1b": (0.9,), "fig3": (0.6, 0.9), "fig4": (2.0, 4.0), "table5": (1.0, 2.0)}

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"


def experiment(name: str) -> Experiment:
    found: Experiment = import_module(f"experiments.{name}").EXPERIMENT
    return found


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama-7b")
    LlamaConfig(dtype="float16").save_pretrained(folder)  # transformers' default sizes are those of LLaMA-7B
    return str(folder)


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """The tiny Llama's first two blocks."""
    folder = tmp_path_factory.mktemp("model") / "two-blocks"
    AutoModelForCausalLM.from_pretrained(tiny_llama_folder, num_hidden_layers=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    documents = (tiny_llama_folder / "heldout.txt").read_text(encoding="utf-8").split("\n\n")[:30]
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    (folder / "little.jsonl").write_text(lines, encoding="utf-8")
    for name in ("wikitext2", "ptb"):
        (folder / f"{name}.txt").write_text("\n".join(documents), encoding="utf-8")
    (folder / "c4.jsonl").write_text(lines, encoding="utf-8")
    calibration = tiny_llama_folder / "calibration.txt"
    (folder / "calibration.txt").write_text(calibration.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    files = {"wikitext2": "wikitext2.txt", "ptb": "ptb.txt", "c4": "c4.jsonl", "calibration": "calibration.txt"}
    return {name: str(folder / file) for name, file in files.items()}


def options_for(one: Experiment, model: Path, data: dict[str, str]) -> Options:
    conditions = Conditions(str(model), data["calibration"], samples=4, seqlen=32)
    texts = {name: data[name] for name in one.texts}
    measures = Measures(one.texts, texts, window=32, max_windows=4, tasks=one.tasks, limit=2)
    return Options(conditions, measures, 0.6, 1, POINTS.get(one.name, ()))


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, two_blocks: Path, data: dict[str, str]
) -> dict[str, tuple[Found, Path]]:
    """Every experiment, in one workspace."""
    folder = tmp_path_factory.mktemp("experiments")
    done = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_shot, "questions", lambda task, progress: rows(task))
        for name in NAMES:
            one = experiment(name)
            options = options_for(one, two_blocks, data)
            found = carry_out(one, options, Workspace(folder / "work", options.conditions, options.measures, keep=True))
            write(one, found, folder / name, ["--model", str(two_blocks), "--work", str(folder)])
            done[name] = (found, folder / name)
    return done


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_the_settings_of_the_paper(name: str, llama_7b: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", "--model", llama_7b, "--dry-run"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}"}, check=False,
    ) if name == "table1" else None  # fmt: skip
    if result is None:  # a process each would take longer and show the same
        one = experiment(name)
        options = Options(Conditions(llama_7b, "c4"), Measures(one.texts, tasks=one.tasks), 0.5, 1, one.points)
        plan = planned(one, options)
    else:
        assert result.returncode == 0, result.stderr
        plan = json.loads(result.stdout)
    assert PAPER.items() <= plan.items()
    assert (plan["conditions"]["samples"], plan["conditions"]["seqlen"]) == (128, 2048)
    assert plan["conditions"]["calibration"] == "c4"
    assert (plan["measures"]["window"], plan["measures"]["max_windows"]) == (2048, None)
    assert plan["linears"] == 32 * 7
    labels = [case["label"] for case in plan["cases"]]
    assert len(set(labels)) == len(labels)
    for case in plan["cases"]:
        if case["recipe"] is None:
            assert case["label"] == DENSE
            continue
        assert name == "fig4" or case["samples"] == 128
        assert " at " in case["label"] or case["recipe"]["sparsity"] == 0.5
        allocation = case["recipe"]["allocation"]
        if allocation["method"] == "besa":
            epochs = int(match[1]) if (match := re.match(r"(\d+) epoch", case["label"])) else 1
            assert allocation["steps"] == epochs * case["samples"]
            assert allocation["crop"] == 1
            assert allocation["teacher"] == "dense"
            assert allocation["mask"] == "count"
            if "step" not in case["label"]:
                assert allocation["candidate_step"] == 0.01  # D = 100
            if name not in ("table6", "fig5"):
                assert allocation["granularity"] == "block"
            if name != "table5":
                assert case["recipe"]["importance"]["method"] == "wanda"


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("table1", "dense magnitude sparsegpt wanda besa-layerwise besa"),
        ("table2", "dense sparsegpt wanda besa"),
        ("table5", "dense|1 epoch|2 epochs|step 0.1|step 0.01|step 0.001|Weight|Wanda|SparseGPT"),
        ("table6", "dense|layer (Wanda)|linear|attn-mlp|block|two-blocks"),
        ("fig1a", "wanda besa"),
        ("fig5", "layer (Wanda)|linear|attn-mlp|block|two-blocks"),
    ],
)
def test_tables_have_the_paper_s_rows(results: dict[str, tuple[Found, Path]], name: str, labels: str) -> None:
    assert list(results[name][0].rows) == labels.split("|" if "|" in labels else " ")


def test_figures_have_a_case_for_each_point(results: dict[str, tuple[Found, Path]]) -> None:
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    labels = [f"{kind} at 90 %" for kind in kinds]
    assert list(results["fig1b"][0].rows) == [DENSE, *labels]
    assert len(results["fig3"][0].rows) == 1 + 3 * 2
    assert list(results["fig4"][0].rows) == [DENSE, "2 sequences", "4 sequences"]


def test_one_kind_of_layer_is_pruned_at_a_time(results: dict[str, tuple[Found, Path]]) -> None:
    for label, (outcome, *_) in results["fig1b"][0].outcomes.items():
        if outcome.record is not None:
            kind, _, share = label.partition(" at ")
            pruned = [linear for block in outcome.record.blocks for linear in block.linears]
            assert [linear.name.rpartition(".")[2] for linear in pruned] == [kind, kind]
            assert outcome.record.sparsity == pytest.approx(float(share.split()[0]) / 100, abs=1e-4)


def test_runs_are_shared_between_experiments(results: dict[str, tuple[Found, Path]]) -> None:
    table1, table6 = results["table1"][0].outcomes, results["table6"][0].outcomes
    assert table1["wanda"][0].record == table6["layer (Wanda)"][0].record
    assert table1["besa"][0].record == table6["block"][0].record == results["fig1a"][0].outcomes["besa"][0].record
    assert table1["besa"][0].scores == table6["block"][0].scores == results["table5"][0].outcomes["step 0.01"][0].scores


@pytest.mark.parametrize("name", NAMES)
def test_files_say_what_was_done_and_found(results: dict[str, tuple[Found, Path]], name: str) -> None:
    found, folder = results[name]
    result = json.loads((folder / f"{name}.json").read_text())
    assert result["command"] == ["python", "-m", f"experiments.{name}", "--model", "two-blocks"]
    assert result["model"] == "two-blocks"
    assert [row["recipe"] for row in result["rows"]] == list(found.rows)
    assert result["verdict"]["found"].endswith(".")
    assert result["verdict"]["holds"] in ((True, False, None) if name == "table2" else (True, False))
    assert str(folder.parent) not in json.dumps(result)
    page = (folder / f"{name}.md").read_text()
    assert result["verdict"]["found"] in page
    assert f"![{result['title']}]({name}.svg)" in page
    assert ("does not hold here" in page) == (result["verdict"]["holds"] is False)
    root = ElementTree.parse(folder / f"{name}.svg").getroot()
    assert root.tag.endswith("svg")
    drawn = [curve for panel in result["panels"] for curve in panel["curves"]]
    assert drawn
    for curve in drawn:
        assert len(curve["x"]) == len(curve["y"]) >= 1


def test_table_3_counts_what_its_checkpoints_hold(
    two_blocks: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table3, "RESULTS", tmp_path)
    monkeypatch.setattr(table3, "RECIPES", {name: table3.RECIPES[name] for name in ("dense", "wanda-int4")})
    given = {"samples": 4, "seqlen": 32, "window": 32, "max_windows": 4, "work": tmp_path / "work"}
    table3.main(str(two_blocks), [f"wikitext2={data['wikitext2']}"], **given)
    dense, joint = Result.read(tmp_path / "table3.json").rows
    (checkpoint,) = (tmp_path / "work").glob("wanda-int4-*/")
    for row, model in ((dense, two_blocks), (joint, checkpoint)):
        measured = besa.evaluate(model, ["wikitext2"], data={"wikitext2": data["wikitext2"]}, window=32, max_windows=4)
        assert row["perplexity"] == pytest.approx(measured.perplexity, rel=1e-6)
    contents = inspect(locate(checkpoint))
    assert (joint["sparsity"], joint["bits_per_weight"]) == (contents.sparsity, contents.bits_per_weight)
    line = (tmp_path / "table3.md").read_text().splitlines()[4]
    assert line.startswith(f"| Joint-Wanda: clipping learned, then Wanda | 50.0000% | {contents.bits_per_weight:.3f} |")


def test_errors_are_those_of_the_records(results: dict[str, tuple[Found, Path]]) -> None:
    found, _ = results["fig5"]
    for label, (outcome,) in found.outcomes.items():
        assert outcome.record is not None
        each = [block.reconstruction_error for block in outcome.record.blocks]
        assert [found.rows[label].mean[score] for score in ERRORS] == pytest.approx([each[0], sum(each) / 2, each[-1]])


def fake(points: tuple[float, ...] = (0.5, 0.7), **scores: float) -> Found:
    """Found perplexities."""
    from besa.studies.rows import Row

    options = Options(Conditions(str(TINY)), Measures(), 0.5, 1, points)
    made = {
        label.replace("_", " "): Row(
            recipe=label, sparsity=0.5, seeds=1, mean={"wikitext2": value}, spread={}, values={}, seconds=1
        )
        for label, value in scores.items()
    }
    return Found(options, made, {})


def judged(name: str, **scores: float) -> Verdict:
    points = (1, 3, 10, 30) if name == "table5" else (0.5, 0.7)
    return experiment(name).verdict(fake(points, **scores))


def test_verdicts_say_so_where_a_trend_does_not_hold() -> None:
    table1 = {"sparsegpt": 7.2, "wanda": 7.3, "besa-layerwise": 7.0, "besa": 6.9}
    assert judged("table1", **table1) == Verdict(
        "wikitext2: sparsegpt 7.20, wanda 7.30, besa-layerwise 7.00, besa 6.90.", True
    )
    assert not judged("table1", **table1 | {"besa": 7.1}).holds
    table6 = {"layer (Wanda)": 7.26, "linear": 7.2, "attn-mlp": 6.97, "block": 6.86, "two-blocks": 6.8}
    assert judged("table6", **table6).holds
    assert not judged("table6", **table6 | {"attn-mlp": 6.8}).holds
    table5 = {"1 epoch": 6.86, "3 epochs": 6.85, "10 epochs": 6.84, "30 epochs": 6.86}
    table5 |= {
        "step 0.1": 6.84,
        "step 0.01": 6.86,
        "step 0.001": 6.86,
        "Weight": 7.43,
        "Wanda": 6.86,
        "SparseGPT": 8.73,
    }
    assert judged("table5", **table5).holds
    assert not judged("table5", **table5 | {"30 epochs": 6.5}).holds
    assert not judged("table5", **table5 | {"SparseGPT": 6.5}).holds
    fig3 = {"sparsegpt at 50 %": 7.2, "wanda at 50 %": 7.3, "besa at 50 %": 6.9}
    fig3 |= {"sparsegpt at 70 %": 27.0, "wanda at 70 %": 76.0, "besa at 70 %": 25.0}
    assert judged("fig3", **fig3).holds
    assert judged("fig3", **fig3 | {"besa at 70 %": 30.0}).found.startswith("BESA is the lowest at 1 of 2 sparsities")
    fig1b = {"dense": 5.7, "q at 70 %": 6.0, "v at 70 %": 9.0}
    assert judged("fig1b", **fig1b).holds
    assert not judged("fig1b", **fig1b | {"v at 70 %": 6.1}).holds


def test_accuracies_within_their_error_tell_nothing() -> None:
    asked = zero_shot.ZeroShot.model_validate(
        {
            "tasks": {
                name: {"acc": 0.5, "acc_stderr": 0.03, "questions": 9, "version": 1} for name in ("piqa", "boolq")
            },
            "mean": 0.5,
            "source": "embedded",
            "limit": None,
            "lm_eval": "0.4",
        }
    )
    assert asked.stderr == pytest.approx(0.03 / 2**0.5)  # of two that have the same
    outcome = SimpleNamespace(evaluations=[SimpleNamespace(zero_shot=None), SimpleNamespace(zero_shot=asked)])
    for lead, holds in [(2.0, None), (3.0, True), (-2.0, None), (-3.0, False)]:
        scores = {"dense": 60.0, "sparsegpt": 45.0, "wanda": 50.0, "besa": 50.0 + lead}
        rows = {
            label: row.model_copy(update={"mean": {"accuracy": row.mean["wikitext2"]}})
            for label, row in fake(**scores).rows.items()
        }
        found = replace(fake(**scores), rows=rows, outcomes={"besa": [outcome]})  # type: ignore[list-item]
        verdict = experiment("table2").verdict(found)
        assert verdict.holds is holds
        assert verdict.found.endswith(f"besa {50 + lead:.2f}; each has a standard error of 2.12.")


def test_calibrated_documents_are_left_out_of_what_is_measured(
    tmp_path: Path, data: dict[str, str], tiny_llama_folder: Path
) -> None:
    (tmp_path / "known.jsonl").write_text("".join(Path(data["c4"]).read_text().splitlines(keepends=True)[:3]))
    measures = Measures(("c4", "ptb"), {"c4": data["c4"], "ptb": data["ptb"]})
    options = Options(Conditions("m", str(tmp_path / "known.jsonl")), measures, 0.5, 1, ())
    files, notes = without_calibration(options, tmp_path)
    assert files["ptb"] == data["ptb"]
    known = set(read_documents(str(tmp_path / "known.jsonl")))
    assert list(read_documents(files["c4"])) == [text for text in read_documents(data["c4"]) if text not in known]
    assert notes == ["c4 is c4.jsonl without 3 documents that models are calibrated on", "ptb is ptb.txt"]


def test_commands_are_shown_without_folders(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    arguments = ["--data", f"ptb={tmp_path / 'a.txt'}", "--work", str(tmp_path), "--results=x", "--samples", "64"]
    assert shown(arguments) == ["--data", "ptb=a.txt", "--samples", "64"]


def test_the_list_of_findings(results: dict[str, tuple[Found, Path]], tmp_path: Path) -> None:
    folder = results["table1"][1].parent
    found = {finding.name: finding for finding in findings(folder)}
    assert set(NAMES) | {"table3", "table4"} == set(found)
    for name in found:
        assert (ROOT / "experiments" / f"{name}.py").is_file()
    assert found["table3"].trend == "not run"
    verdict = experiment("table1").verdict(results["table1"][0])
    assert (found["table1"].here, found["table1"].holds) == (verdict.found, verdict.holds)
    assert found["table1"].trend == ("yes" if verdict.holds else "no")
    page = listed(list(found.values()))
    assert f"{verdict.found} (two-blocks, 20" in page
    assert "| table3: " in page
    (tmp_path / "table1").mkdir()
    (tmp_path / "table1" / "table1.json").write_text("[]")
    from besa.errors import BesaError

    with pytest.raises(BesaError, match=r"table1\.json is not the result of an experiment"):
        findings(tmp_path)


def test_experiments_are_listed_with_their_verdicts(results: dict[str, tuple[Found, Path]]) -> None:
    folder = str(results["table1"][1].parent)
    run = subprocess.run(
        [sys.executable, "-m", "experiments", folder],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "300"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "not run" in run.stdout
    assert "The coarser the better" in run.stdout


def test_points_alone_are_named_where_they_are_and_crowded_places_get_round_ticks() -> None:
    places = {"first": 2.05, "next": 2.2, "last": 7.0}
    points = [Curve(name, 0, [x], [9.0 - x]) for name, x in places.items()]
    drawing = ElementTree.fromstring(str(curves("A title", [Panel(points, "passes", "perplexity", log_x=True)])))
    texts = ["".join(found.itertext()).strip() for found in drawing.iter() if found.tag.endswith("text")]
    assert set(places) <= set(texts)
    assert {"2", "4"} <= set(texts) and "2.05" not in texts


def test_beyond_names_its_winner_and_draws_the_frontier() -> None:
    from experiments.beyond import PATTERN, PATTERNS, frontier, methods

    names = methods(Options(Conditions(str(TINY)), Measures(), 0.5, 1, ()), 0.5)
    scores = {"dense": 5.0, **{f"{name} at {column}": 9.0 for name in names for column in ("50 %", "70 %")}}
    scores |= {f"{name} at {PATTERN}": 9.0 for name in PATTERNS}
    scores |= {f"best at {column}": 7.0 for column in ("50 %", "70 %", PATTERN)} | {"fast at 50 %": 8.0}
    assert judged("beyond", **scores).holds
    lost = judged("beyond", **scores | {"sparsegpt at 70 %": 6.0})
    assert lost.found.startswith("best is first in 2 of 3 columns") and not lost.holds
    edge, *points = frontier(fake(**scores)).curves
    assert {point.label for point in points} == set(names) - {"magnitude"}
    assert edge.y == [9.0, 8.0, 7.0] and list(edge.x) == sorted(edge.x)
    spent = names["best"].distill.epochs
    assert spent == 4 and edge.x[-1] <= 20
