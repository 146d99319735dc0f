"""The experiments: settings and sizes are what they say, and each runs, writes its files and judges its claim."""

import json
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import besa
from besa.checkpoint.inspection import inspect
from besa.data.documents import read_documents
from besa.errors import BesaError, Interrupted
from besa.evaluation import zero_shot
from besa.models.source import locate
from besa.report.curves import Curve, Panel, curves
from besa.studies.rows import Row
from besa.studies.workspace import DENSE, Conditions, Measures
from experiments import confirming, sizes, table4
from experiments.__main__ import listed as shown_table
from experiments.all import Place, listed, main, make, small_texts
from experiments.confirming import confirm
from experiments.experiment import ERRORS, Experiment, Found, Options, linear_names
from experiments.items import Item, chosen, items
from experiments.judging import Verdict
from experiments.paper import findings
from experiments.paper import listed as listed_findings
from experiments.result import Result
from experiments.running import Runs
from experiments.settings import DEFAULTS, PAPER, RELEASED
from experiments.sizes import Sizes
from experiments.writing import shown, without_calibration, without_folders, write
from tests.slowly import some_slow
from tests.tiny_questions import rows

ROOT = Path(__file__).parent.parent.parent
NAMES = ("table1", "table2", "table3", "table4", "table5", "table6", "fig1a", "fig1b", "fig3", "fig4", "fig5")
LOOKED = ("table3", "table4")  # take their cases from checkpoints; run apart
RUN = tuple(name for name in NAMES if name not in LOOKED)

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


def item(name: str, model: Path, data: dict[str, str]) -> Item:
    """An experiment on a little model, calibrated on a file."""
    one = replace(experiment(name), calibration=data["calibration"])
    return Item(one, one.settings[0], str(model))


def little(name: str) -> Sizes:
    return replace(sizes.sizes("small", name, ""), seeds=1)


class Results(dict[str, tuple[Found, Path]]):
    """Experiments, each made when it is first asked for, in one folder of runs."""

    def __init__(self, folder: Path, model: Path, data: dict[str, str]) -> None:
        self.folder, self.model, self.data = folder, model, data

    def __missing__(self, name: str) -> tuple[Found, Path]:
        one, folder = item(name, self.model, self.data), self.folder / name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(zero_shot, "questions", lambda task, progress: rows(task))
            runs = Runs(one.experiment, one.options(little(name), self.data), self.folder / "work", keep=True)
            found = runs.found(1)
        write(one, little(name), found, runs.inputs, folder, ["python", "-m", "experiments.all"])
        self[name] = found, folder
        return self[name]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, two_blocks: Path, data: dict[str, str]) -> Results:
    return Results(tmp_path_factory.mktemp("experiments"), two_blocks, data)


def test_the_paper_s_sizes_are_the_defaults() -> None:
    assert (sizes.PAPER.samples, sizes.PAPER.seqlen, sizes.PAPER.window) == (128, 2048, 2048)
    assert (sizes.PAPER.max_windows, sizes.PAPER.questions) == (None, None)
    assert Item(experiment("table2"), PAPER, "smollm2").sizes("cpu").questions == 1000
    assert "questions" not in Item(experiment("table1"), PAPER, "smollm2").sizes("cpu").words
    assert sizes.sizes("cpu", "table5", "smollm2").seeds == 3
    assert max(experiment("fig4").points) == 256 and max(experiment("table5").points) == 30
    assert (min(experiment("fig3").points), max(experiment("fig3").points)) == (0.1, 0.8)


@pytest.mark.parametrize("name", NAMES)
def test_the_paper_s_setting_is_that_of_its_text(name: str, llama_7b: str) -> None:
    one = experiment(name)
    options = Item(one, PAPER, llama_7b).options(sizes.PAPER, {})
    assert (options.sparsity, options.conditions.calibration) == (0.5, "c4")
    assert sum(len(own) for own in linear_names(llama_7b).values()) == 32 * 7
    cases = one.cases(options)
    assert len({case.label for case in cases}) == len(cases)
    for case in cases:
        if case.recipe is None:
            assert case.label == DENSE
            continue
        samples = case.samples or options.conditions.samples
        assert name == "fig4" or samples == 128
        assert " at " in case.label or case.recipe.sparsity == (0 if case.label == "4 bits alone" else 0.5)
        allocation = case.recipe.allocation.model_dump()
        if allocation["method"] == "besa":
            epochs = int(match[1]) if (match := re.match(r"(\d+) epoch", case.label)) else 1
            assert allocation["steps"] == epochs * samples
            assert (allocation["crop"], allocation["plain"], allocation["mask"]) == (1, 1, "probability")
            assert allocation["teacher"] == "dense"
            if "step" not in case.label:
                assert allocation["candidate_step"] == 0.01  # D = 100
            if name not in ("table6", "fig5"):
                assert allocation["granularity"] == "block"
            if name != "table5":
                assert case.recipe.importance.method == "wanda"


def test_other_settings_are_the_program_s_and_besa_s_own(llama_7b: str) -> None:
    one = experiment("table1")
    released = {case.label: case.recipe for case in one.cases(Item(one, RELEASED, llama_7b).options(sizes.PAPER, {}))}
    row, layer = (released[name].allocation for name in ("besa", "besa-layerwise"))
    assert (row.teacher, row.plain, row.mask, row.steps) == ("pruned", 0, "count", 128)
    assert (layer.teacher, layer.plain, layer.rates) == ("dense", 0, "layer")
    ours = {case.label: case.recipe for case in one.cases(Item(one, DEFAULTS, llama_7b).options(sizes.PAPER, {}))}
    for name in ("besa", "besa-layerwise", "wanda"):
        assert ours[name] == besa.Recipe.load(name, 0.5)
    assert "dense path" in PAPER.words and "program" in PAPER.words  # both readings are named
    assert "paper writes" in RELEASED.words


def test_every_result_is_listed_once_and_found_by_its_experiment() -> None:
    names = [one.name for one in items()]
    assert len(set(names)) == len(names)
    assert {"table1", "table1-released", "table1-defaults", "table5-defaults", "fig1b", "beyond"} <= set(names)
    assert {"table1-qwen2.5-coder-1.5b", "table6-defaults-qwen2.5-coder-1.5b", "domains-gemma3-270m"} <= set(names)
    assert [one.name for one in chosen(["fig3"])] == ["fig3", "fig3-defaults"]
    assert [one.name for one in chosen(["table1-defaults"])] == ["table1-defaults"]
    with pytest.raises(BesaError, match="There is no result 'table9': choose from table1, table6"):
        chosen(["table9"])


LABELS = [
    ("table1", "dense magnitude sparsegpt wanda besa-layerwise besa"),
    ("table2", "dense sparsegpt wanda besa"),
    ("table5", "dense|1 epoch|2 epochs|step 0.1|step 0.01|step 0.001|Weight|Wanda|SparseGPT"),
    ("table6", "dense|layer (Wanda)|linear|attn-mlp|block|two-blocks"),
    ("fig1a", "wanda besa"),
    ("fig5", "layer (Wanda)|linear|attn-mlp|block|two-blocks"),
]


@pytest.mark.parametrize(("name", "labels"), some_slow(LABELS, LABELS[1:3]))
def test_tables_have_the_paper_s_rows(results: Results, name: str, labels: str) -> None:
    assert list(results[name][0].rows) == labels.split("|" if "|" in labels else " ")


@pytest.mark.slow
def test_figures_have_a_case_for_each_point(results: Results) -> None:
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    labels = [f"{kind} at 90 %" for kind in kinds]
    assert list(results["fig1b"][0].rows) == [DENSE, *labels]
    assert len(results["fig3"][0].rows) == 1 + 3 * 2
    assert list(results["fig4"][0].rows) == [DENSE, "2 sequences", "4 sequences"]


@pytest.mark.slow
def test_one_kind_of_layer_is_pruned_at_a_time(results: Results) -> None:
    for label, (outcome, *_) in results["fig1b"][0].outcomes.items():
        if outcome.record is not None:
            kind, _, share = label.partition(" at ")
            pruned = [linear for block in outcome.record.blocks for linear in block.linears]
            assert [linear.name.rpartition(".")[2] for linear in pruned] == [kind, kind]
            assert outcome.record.sparsity == pytest.approx(float(share.split()[0]) / 100, abs=1e-4)


@pytest.mark.slow
def test_runs_are_shared_between_experiments(results: Results) -> None:
    table1, table6 = results["table1"][0].outcomes, results["table6"][0].outcomes
    assert table1["wanda"][0].record == table6["layer (Wanda)"][0].record
    assert table1["besa"][0].record == table6["block"][0].record == results["fig1a"][0].outcomes["besa"][0].record
    assert table1["besa"][0].scores == table6["block"][0].scores == results["table5"][0].outcomes["step 0.01"][0].scores


@pytest.mark.parametrize("name", some_slow(RUN, {"table2", "table5", "fig1b", "fig3", "fig4"}))
def test_files_say_what_was_done_and_found(results: Results, name: str) -> None:
    found, folder = results[name]
    result = json.loads((folder / f"{name}.json").read_text())
    assert result["command"] == ["python", "-m", "experiments.all"]
    assert (result["model"], result["setting"]["name"]) == ("two-blocks", experiment(name).settings[0].name)
    assert result["sizes"]["samples"] == 4
    assert [row["recipe"] for row in result["rows"]] == list(found.rows)
    assert result["verdict"]["found"].endswith(".")
    assert result["verdict"]["holds"] is None or name == "table2"  # of one seed; of questions, it may be known
    assert [cell["label"] for cell in result["cells"]] == list(found.rows)
    for cell in result["cells"]:
        assert cell["seconds"] is None or cell["seconds"] > 0  # None: another experiment made it
        assert cell["peak_memory_bytes"] > 0 or cell["label"] == DENSE
        assert {"commit", "versions", "machine", "created", "command", "run", "seed"} <= cell.keys()
    assert str(folder.parent) not in json.dumps(result)
    page = (folder / f"{name}.md").read_text()
    assert result["verdict"]["found"] in page
    assert f"![{result['title']}]({name}.svg)" in page
    assert "samples 4, seqlen 32, window 32, max_windows 4" in page and "Student's 95% interval" in page
    assert f"BESA {result['setting']['words']}." in page
    root = ElementTree.parse(folder / f"{name}.svg").getroot()
    assert root.tag.endswith("svg")
    drawn = [curve for panel in result["panels"] for curve in panel["curves"]]
    assert drawn
    for curve in drawn:
        assert len(curve["x"]) == len(curve["y"]) >= 1


def test_table_3_counts_what_its_checkpoints_hold(two_blocks: Path, data: dict[str, str], tmp_path: Path) -> None:
    one = item("table3", two_blocks, data)
    label = "Joint-Wanda: clipping learned, then Wanda"
    kept: list[tuple[float, float, float]] = []

    def look(checkpoint: Path) -> dict[str, float]:
        text = {"wikitext2": data["wikitext2"]}
        measured = besa.evaluate(checkpoint, ["wikitext2"], data=text, window=32, max_windows=4)
        contents = inspect(locate(checkpoint))
        kept.append((measured.perplexity["wikitext2"], contents.sparsity, contents.bits_per_weight))
        return experiment("table3").look(checkpoint)

    def some(options: Options) -> list:
        return [case for case in experiment("table3").cases(options) if case.label in (DENSE, label)]

    less = replace(one.experiment, texts=("wikitext2",), look=look, cases=some)
    found = Runs(less, replace(one, experiment=less).options(little("table3"), data), tmp_path).found(1)
    ((perplexity, sparsity, bits),) = kept
    mean = found.rows[label].mean
    assert mean == {"wikitext2": pytest.approx(perplexity, rel=1e-6), "bits a weight": bits, "sparsity": sparsity}
    assert f"| {label} | 50.0000% | {bits:.3f} |" in less.table(found)
    cases = experiment("table3").cases(one.options(little("table3"), data))
    pruned = {case.label: case.recipe.sparsity for case in cases if case.recipe}
    assert pruned.pop("4 bits alone") == 0 and set(pruned.values()) == {0.5}
    assert not list(tmp_path.glob("*/wanda-int4-*/"))  # nothing needs the weights any more


def test_table_4_counts_cycles_of_its_checkpoints(
    two_blocks: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table4, "RANDOM", table4.RANDOM[3:4])
    one = item("table4", two_blocks, data)
    runs = Runs(one.experiment, one.options(little("table4"), data), tmp_path)
    found = runs.found(1)
    recipe = next(case.recipe for case in runs.cases if case.label == "wanda")
    besa.compress(str(two_blocks), recipe, data["calibration"], samples=4, seqlen=32, out=tmp_path / "again")
    gains = besa.simulate(tmp_path / "again").block.speedup
    assert list(found.rows["wanda"].mean.values()) == pytest.approx(list(gains.values()))
    page = one.experiment.table(found)
    assert f"| published formula | {found.rows['magnitude'].mean['published formula']:.2f}× |" in page
    assert "| 4096 × 4096 | 50.0% | 0 | 3,089 | 3,089 | 2,048 |" in page
    assert "| with memory, 512 tokens | besa |" in page
    monkeypatch.setattr("besa.studies.workspace.compress", None)
    assert Runs(one.experiment, runs.options, tmp_path).found(1).rows == found.rows  # also without the weights


def test_errors_are_those_of_the_records(results: Results) -> None:
    found, _ = results["fig5"]
    for label, (outcome,) in found.outcomes.items():
        assert outcome.record is not None
        each = [block.reconstruction_error for block in outcome.record.blocks]
        assert [found.rows[label].mean[score] for score in ERRORS] == pytest.approx([each[0], sum(each) / 2, each[-1]])


def fake(points: tuple[float, ...] = (0.5, 0.7), **scores: list[float]) -> Found:
    """Found perplexities, by seed."""
    options = Options(Conditions(str(TINY)), Measures(), points)
    made = {}
    for label, values in scores.items():
        mean = {"wikitext2": sum(values) / len(values)}
        made[label] = Row(
            recipe=label, sparsity=0.5, seeds=len(values), mean=mean, spread={}, values={"wikitext2": values}, seconds=1
        )
    return Found(options, made, {})


def judged(name: str, **scores: list[float]) -> Verdict:
    points = (1, 3, 10, 30) if name == "table5" else (4, 16, 64, 256) if name == "fig4" else (0.5, 0.7)
    return experiment(name).verdict(fake(points, **scores))


def near(value: float) -> list[float]:
    """Three seeds that vary alike in all cases, so that paired differences vary little."""
    return [0.98 * value, value, 1.021 * value]


def test_verdicts_say_what_the_seeds_allow() -> None:
    table1 = {"sparsegpt": near(7.2), "wanda": near(7.3), "besa-layerwise": near(7.0), "besa": [6.8, 6.9, 7.03]}
    found = judged("table1", **table1)
    assert found.holds is True
    assert found.found.endswith("besa against sparsegpt -4.1 ± 0.2 %, wanda -5.4 ± 0.2 %.")
    assert judged("table1", **{name: values[1:2] for name, values in table1.items()}) == Verdict(
        "wikitext2: sparsegpt 7.20, wanda 7.30, besa-layerwise 7.00, besa 6.90, "
        "besa against sparsegpt -4.2 %, wanda -5.5 %.",
        None,
        True,
    )
    assert judged("table1", **table1 | {"besa": [7.0, 7.3, 7.15]}).holds is None
    assert judged("table1", **table1 | {"besa": [7.3, 7.5, 7.7]}).holds is False
    table6 = {"layer (Wanda)": near(7.26), "linear": near(7.2), "attn-mlp": near(6.97)}
    table6 |= {"block": [6.7, 6.86, 7.0], "two-blocks": [6.6, 6.7, 6.85]}
    table6["attn-mlp"] = [6.85, 6.97, 7.15]
    assert judged("table6", **table6).holds is True
    assert judged("table6", **table6 | {"attn-mlp": [6.58, 6.72, 6.87]}).holds is False
    table5 = {"1 epoch": near(6.86), "3 epochs": [6.7, 6.87, 7.0], "10 epochs": near(6.86), "30 epochs": near(6.85)}
    table5 |= {"step 0.1": near(6.84), "step 0.01": near(6.86), "step 0.001": [6.72, 6.86, 7.01]}
    table5 |= {"Weight": [7.3, 7.43, 7.6], "Wanda": near(6.86), "SparseGPT": [8.5, 8.73, 8.9]}
    assert judged("table5", **table5).holds is True
    assert judged("table5", **table5 | {"30 epochs": [6.4, 6.5, 6.65]}).holds is False
    assert judged("table5", **table5 | {"30 epochs": [6.6, 6.7, 6.95]}).holds is None
    assert judged("table5", **table5 | {"SparseGPT": [6.5, 6.6, 6.7]}).holds is False
    fig3 = {"sparsegpt at 50 %": near(7.2), "wanda at 50 %": near(7.3), "besa at 50 %": [6.8, 6.9, 7.03]}
    fig3 |= {"sparsegpt at 70 %": near(27.0), "wanda at 70 %": near(76.0), "besa at 70 %": [24.0, 25.0, 25.3]}
    assert judged("fig3", **fig3).holds is True
    lost = judged("fig3", **fig3 | {"besa at 70 %": [29.0, 30.0, 31.0]})
    assert lost.found.startswith("BESA's mean is the lowest at 1 of 2 sparsities") and lost.holds is False
    fig1b = {"dense": [5.7], "q at 70 %": [5.9, 6.0, 6.1], "v at 70 %": [8.9, 9.0, 9.2]}
    assert judged("fig1b", **fig1b).holds is True
    assert judged("fig1b", **fig1b | {"v at 70 %": [5.95, 6.05, 6.15]}).holds is False
    fig4 = {"4 sequences": near(9.0), "16 sequences": near(8.0), "64 sequences": [7.4, 7.5, 7.7]}
    assert judged("fig4", **fig4 | {"256 sequences": [7.39, 7.5, 7.71]}).holds is True
    assert judged("fig4", **fig4 | {"256 sequences": [7.0, 7.1, 7.2]}).holds is False
    untried = experiment("fig4").verdict(fake((4, 16, 64), **fig4))
    assert (untried.holds, untried.points) == (None, None)


def test_errors_of_every_block_are_judged() -> None:
    def made(*errors: float) -> SimpleNamespace:
        return SimpleNamespace(record=SimpleNamespace(blocks=[SimpleNamespace(reconstruction_error=e) for e in errors]))

    def found(*ours: SimpleNamespace) -> Found:
        outcomes = {"wanda": [made(0.2, 0.4), made(0.21, 0.43), made(0.19, 0.4)], "besa": list(ours)}
        spread = fake(wanda=[0.4], besa=[0.3])
        last = {
            label: row.model_copy(update={"mean": {ERRORS[-1]: row.mean["wikitext2"]}})
            for label, row in spread.rows.items()
        }
        return replace(spread, rows=last, outcomes=outcomes)  # type: ignore[arg-type]

    verdict = experiment("fig1a").verdict(found(made(0.15, 0.2), made(0.16, 0.22), made(0.14, 0.2)))
    assert verdict.holds is True and verdict.found.startswith("Below Wanda's in 2 of 2 blocks")
    assert experiment("fig1a").verdict(found(made(0.15, 0.5), made(0.16, 0.5), made(0.14, 0.5))).holds is False


def test_accuracies_are_compared_question_by_question() -> None:
    def answered(right: str) -> SimpleNamespace:
        task = {"acc": right.count("1") / len(right), "acc_stderr": 0.03, "questions": len(right), "version": 1}
        asked = {"tasks": {"piqa": task | {"right": right, "asked": "a"}}, "mean": 0.5, "source": "embedded"}
        return SimpleNamespace(
            evaluation=SimpleNamespace(
                zero_shot=zero_shot.ZeroShot.model_validate(asked | {"limit": None, "lm_eval": "0"})
            )
        )

    base = "10" * 50
    for gained, holds in [(0, None), (3, None), (8, True), (-8, False)]:
        ours = base.replace("0", "1", gained) if gained > 0 else base.replace("1", "0", -gained)
        spread = fake(sparsegpt=[50.0], wanda=[50.0], besa=[50.0 + gained])
        accuracy = {
            label: row.model_copy(update={"mean": {"accuracy": row.mean["wikitext2"]}})
            for label, row in spread.rows.items()
        }
        outcomes = {"sparsegpt": [answered(base)], "wanda": [answered(base)], "besa": [answered(ours)]}
        verdict = experiment("table2").verdict(replace(spread, rows=accuracy, outcomes=outcomes))  # type: ignore[arg-type]
        assert verdict.holds is holds, gained
    # 8 questions of 100 lost: -8 points, and a paired error of 100 · √(0.08 · 0.92 / 99) = 2.73
    assert verdict.found.endswith("besa against sparsegpt -8.00 ± 2.73 points, wanda -8.00 ± 2.73 points.")


def test_calibrated_documents_are_left_out_of_what_is_measured(
    tmp_path: Path, data: dict[str, str], tiny_llama_folder: Path
) -> None:
    words = Path(data["calibration"]).read_text().split()
    documents = [" ".join(words[start : start + 60]) for start in range(0, 360, 60)]
    same, broken, half = documents[0], documents[1].replace(" ", "\n"), "Other words. " + documents[2][200:]
    assert 20 < len(half.split()) < 60
    for name, texts in {"known": (same, broken, half), "c4": documents}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "made").mkdir()
    measures = Measures(("c4", "ptb"), {"c4": str(tmp_path / "c4.jsonl"), "ptb": data["ptb"]})
    options = Options(Conditions("m", str(tmp_path / "known.jsonl")), measures)
    files, notes = without_calibration(options, tmp_path / "made")
    assert files["ptb"] == data["ptb"]
    assert list(read_documents(files["c4"])) == documents[3:]
    gone = "without 3 documents that calibration texts have too, whole or in part"
    assert notes == [f"c4 is c4.jsonl {gone}", "ptb is ptb.txt"]


def test_files_are_told_without_their_folders() -> None:
    assert without_folders("some/where/a.txt") == "a.txt"
    assert without_folders("self:1,some/where/a.txt:2,hf:some/data:3") == "self:0.167,a.txt:0.333,hf:some/data:0.5"


def test_commands_are_shown_without_folders(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    arguments = ["--data", f"ptb={tmp_path / 'a.txt'}", "--work", str(tmp_path), "--results=x", "--small"]
    assert shown(arguments) == ["--data", "ptb=a.txt", "--small"]


@pytest.fixture
def place(tmp_path: Path, data: dict[str, str]) -> Place:
    return Place("small", data, "cpu", tmp_path / "work", tmp_path / "results", ("python", "-m", "experiments.all"))


def test_a_killed_program_goes_on_and_what_is_done_is_kept(
    two_blocks: Path, data: dict[str, str], place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Killed in the third run of six: those before are kept, the others made; then nothing is left to do."""
    from besa.studies import workspace

    todo = [item("fig1a", two_blocks, data), item("fig5", two_blocks, data)]
    made: list[str] = []
    killed_at = 3
    genuine = workspace.compress

    def compress(**given: object) -> object:
        made.append(Path(str(given["out"])).name.rpartition("-")[0])
        if len(made) == killed_at:
            raise KeyboardInterrupt
        return genuine(**given)

    monkeypatch.setattr(workspace, "compress", compress)
    with pytest.raises(Interrupted, match="the same command goes on"):
        make(todo, place)
    assert made == ["wanda-0.5-seed0", "besa-0.5-seed0", "besa-0.5-seed0"]
    assert "| fig1a | samples 4, " in listed(todo, place)
    before = json.loads(place.file(todo[0]).read_text())
    assert before["sizes"]["seeds"] == 1  # the first seed of all comes before the second of any
    make(todo, place)
    # fig1a's runs are two of fig5's; of the second seed all five are new
    assert sorted(made[killed_at:]) == sorted(["besa-0.5-seed0"] * 3 + ["wanda-0.5-seed1"] + ["besa-0.5-seed1"] * 4)
    for one in todo:
        result = Result.read(place.file(one))
        assert (result.sizes["seeds"], result.older()) == (2, [])
        assert {row["seeds"] for row in result.rows} == {2}
        assert len(result.cells) == 2 * len(result.rows)
    written = place.file(todo[0]).stat().st_mtime_ns
    number = len(made)
    capsys.readouterr()
    make(todo, place)
    assert (len(made), place.file(todo[0]).stat().st_mtime_ns, capsys.readouterr().out) == (number, written, "")
    assert re.search(r"\| fig5 \| samples 4, .* \| 2 \| 10 \| 10 \| 0\.00 \|", listed(todo, place))


@pytest.mark.slow
def test_seeds_are_added_to_a_result_of_another_machine(
    two_blocks: Path, data: dict[str, str], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the result was kept of the first seed; the second is made, and both stand in it as if made in one go."""
    from besa.studies import workspace

    one = item("table6", two_blocks, data)
    made: list[str] = []
    genuine = workspace.compress
    monkeypatch.setattr(workspace, "compress", lambda **given: made.append(given["seed"]) or genuine(**given))
    make([one], place)
    whole = Result.read(place.file(one))
    runs, first = place.runs(one), place.runs(one).found(1)
    write(one, replace(one.sizes(place.preset), seeds=1), first, runs.inputs, place.file(one).parent, runs.command)
    elsewhere = {"system": "linux", "processor": "Another", "threads": 3, "device": "cpu", "gpu": None}
    content = json.loads(place.file(one).read_text())
    for cell in content["cells"]:
        cell["machine"] = elsewhere
    place.file(one).write_text(json.dumps(content))
    made.clear()
    fresh = replace(place, work=place.work / "fresh")
    assert re.search(r"\| table6 \| .* \| 1 \| 11 \| 0 \| ", listed([one], fresh))
    make([one], fresh)
    assert set(made) == {1}
    added = Result.read(place.file(one))
    assert [row | {"seconds": None} for row in added.rows] == [row | {"seconds": None} for row in whole.rows]
    assert added.verdict == whole.verdict
    assert {(cell["label"], cell["seed"]) for cell in added.cells} == {
        (cell["label"], cell["seed"]) for cell in whole.cells
    }
    assert " on Another, 3 threads and " in added.made


def cells_of(result: Result) -> set[tuple[str, int]]:
    return {(cell["label"], cell["seed"]) for cell in result.cells}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a commit is checked out")
@pytest.mark.slow
def test_newer_code_that_makes_the_same_confirms_a_result(
    two_blocks: Path, data: dict[str, str], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`HEAD` stands for the commit before; its runs and those of the code at work are of the tests' model."""
    one = item("fig1a", two_blocks, data)
    make([one], place)
    file = place.file(one)
    content = json.loads(file.read_text())
    content["code"]["pruning"] = "before"
    del content["settings"]["besa"]["allocation"]["travel"]  # as if that setting had come since
    file.write_text(json.dumps(content))
    assert Result.read(file).older() == ["pruning"]
    older = Result.older
    monkeypatch.setattr(Result, "older", lambda self, root=None: older(self) if root is None else [])
    made: list[Path] = []
    genuine = confirming._made
    monkeypatch.setattr(confirming, "_made", lambda names, root, work: made.append(work) or genuine(names, root, work))
    (said,) = confirm([one], place.results, "HEAD", place.work)
    assert said == "fig1a: 2 cases are equal to the digit; the result is confirmed."
    result = Result.read(file)
    assert result.older() == []
    found = "made 2 cases of it on the tests' model, equal to the digit to those of commit HEAD"
    assert result.confirmed[-1].found == found
    assert "; later code (" in result.note
    assert result.note.endswith("gives identical figures on the small model of the tests")
    assert "Confirmed on 20" in file.with_suffix(".md").read_text()
    small = json.loads((made[0] / "results" / "fig1a" / "fig1a.json").read_text())
    assert small["sizes"]["samples"] == 4
    content = json.loads(file.read_text())
    content["code"]["pruning"] = "before"
    file.write_text(json.dumps(content))
    monkeypatch.setattr(confirming, "_made", lambda names, root, work: work / "results")
    values, allocation = small["rows"][1]["values"]["error, last block"], small["settings"]["besa"]["allocation"]
    for part, key, other in ((values, 0, values[0] + 1e-15), (allocation, "travel", allocation["travel"] + 1)):
        kept, part[key] = part[key], other
        (made[0] / "results" / "fig1a" / "fig1a.json").write_text(json.dumps(small))
        (said,) = confirm([one], place.results, "HEAD", place.work)
        assert said == "fig1a: not as of commit HEAD: besa; make the whole result again."
        assert Result.read(file).older() == ["pruning"]
        part[key] = kept


def test_what_no_commit_made_is_not_confirmed(two_blocks: Path, data: dict[str, str], place: Place) -> None:
    one = item("fig1a", two_blocks, data)
    make([one], place)
    with pytest.raises(BesaError, match="None of these results is older than the present code"):
        confirm([one], place.results, "HEAD", place.work)
    with pytest.raises(BesaError, match="git finds no commit nowhere"):
        confirm([one], place.results, "nowhere", place.work)


def test_the_command_says_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(only=["fig5"], small=True, list_=True, work=tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert "hours left" in lines[0]
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| fig5", "| fig5-defaults", "| all"]
    with pytest.raises(BesaError, match="--small has a model and sizes of its own"):
        main(small=True, paper=True)


def test_texts_of_the_small_size_are_the_model_s_own(tmp_path: Path) -> None:
    texts = small_texts(tmp_path)
    assert "\n\n".join(read_documents(texts["c4"])) == Path(texts["ptb"]).read_text(encoding="utf-8").rstrip("\n")


def test_the_list_of_findings(results: Results, tmp_path: Path) -> None:
    folder = results["table1"][1].parent
    found = {finding.name: finding for finding in findings(folder)}
    assert set(NAMES) == set(found)
    assert found["table3"].trend == "not run"
    verdict = experiment("table1").verdict(results["table1"][0])
    assert found["table1"].here == f"{verdict.found} (two-blocks, paper)"
    assert found["table1"].trend == verdict.words == f"open; means say {'yes' if verdict.points else 'no'}"
    page = listed_findings(list(found.values()))
    assert f"{verdict.found} (two-blocks, paper)" in page
    assert "| table3: " in page
    (tmp_path / "table1").mkdir()
    (tmp_path / "table1" / "table1.json").write_text("[]")
    with pytest.raises(BesaError, match=r"table1\.json is not the result of an experiment"):
        findings(tmp_path)


def test_experiments_are_listed_with_their_verdicts(results: Results, capsys: pytest.CaptureFixture) -> None:
    Console(width=300).print(shown_table(findings(results["table1"][1].parent)))
    printed = capsys.readouterr().out
    assert "not run" in printed
    assert "The coarser the better" in printed


def test_points_alone_are_named_where_they_are_and_crowded_places_get_round_ticks() -> None:
    places = {"first": 2.05, "next": 2.2, "last": 7.0}
    points = [Curve(name, 0, [x], [9.0 - x]) for name, x in places.items()]
    drawing = ElementTree.fromstring(str(curves("A title", [Panel(points, "passes", "perplexity", log_x=True)])))
    texts = ["".join(found.itertext()).strip() for found in drawing.iter() if found.tag.endswith("text")]
    assert set(places) <= set(texts)
    assert {"2", "4"} <= set(texts) and "2.05" not in texts


def test_beyond_names_its_winner_and_draws_the_frontier() -> None:
    from experiments.beyond import PATTERN, PATTERNS, frontier, methods

    names = methods(Options(Conditions(str(TINY)), Measures()), 0.5)
    scores = {"dense": [5.0], **{f"{name} at {column}": near(9.0) for name in names for column in ("50 %", "70 %")}}
    scores |= {f"{name} at {PATTERN}": near(9.0) for name in PATTERNS}
    best = [6.8, 7.0, 7.1]
    scores |= {f"best at {column}": best for column in ("50 %", "70 %", PATTERN)} | {"fast at 50 %": near(8.0)}
    assert judged("beyond", **scores).holds is True
    lost = judged("beyond", **scores | {"sparsegpt at 70 %": [6.0, 6.1, 6.2]})
    assert lost.found.startswith("best is first by the means in 2 of 3 columns") and lost.holds is False
    edge, *points = frontier(fake(**scores)).curves
    assert {point.label for point in points} == set(names) - {"magnitude"}
    assert edge.y == pytest.approx([sum(near(9.0)) / 3, sum(near(8.0)) / 3, sum(best) / 3])
    assert list(edge.x) == sorted(edge.x)
    spent = names["best"].distill.epochs
    assert spent == 3 and edge.x[-1] <= 20


def test_recipes_by_text_and_the_front_page_s_are_judged() -> None:
    by_text = {"wanda": near(45.0), "sparsegpt": near(44.0), "besa": [36.5, 37.0, 38.0], "fast": [31.0, 31.5, 32.0]}
    rows_ = {"dense": [18.0], **by_text, "best": [27.0, 27.5, 28.0]}
    found = fake(**rows_)
    own = {
        label: row.model_copy(update={"mean": {"domains": row.mean["wikitext2"]}, "values": {"domains": rows_[label]}})
        for label, row in found.rows.items()
    }
    verdict = experiment("domains").verdict(replace(found, rows=own))
    assert verdict.holds is True and "best against fast -12.7 ± 0.1 %" in verdict.found
    front = {f"{name} at {at}": near(value) for at in ("50 %", "70 %") for name, value in
             (("wanda", 65.0), ("sparsegpt", 58.0))}  # fmt: skip
    assert judged("front", **front, **{f"besa at {at}": [52.0, 53.0, 54.5] for at in ("50 %", "70 %")}).holds is True
