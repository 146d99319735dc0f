"""The demo, with the tiny Llama in the place of the embedded model."""

from dataclasses import replace
from pathlib import Path

import pytest

import besa
from besa.errors import BesaError, Interrupted
from besa.studies import demo, workspace
from besa.studies.demo import Demo
from tests.calling import called

PLAN = demo.Plan(("wanda", "besa"), samples=8, seqlen=64, window=64, max_windows=10)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, shallow_llama_folder: Path) -> None:
    monkeypatch.setattr(demo, "EMBEDDED", str(shallow_llama_folder))


def run(out: Path, folder: Path, plan: demo.Plan = PLAN, sparsity: float = 0.5) -> Demo:
    return demo.run_demo(out, plan, sparsity, [str(folder / "heldout.txt")], str(folder / "calibration.txt"))


def test_demo_ends_with_checkpoints_a_table_and_a_page(tmp_path: Path, shallow_llama_folder: Path) -> None:
    out = tmp_path / "demo"
    made = run(out, shallow_llama_folder)
    rows = [made.comparison.dense, *made.comparison.rows]
    assert [(row.recipe, row.sparsity) for row in rows] == [("dense", 0), ("wanda", 0.5), ("besa", 0.5)]
    table = [line for line in (out / "compare.md").read_text().splitlines() if line.startswith("|")]
    assert table[4].startswith(f"| besa | 50.0000% | {rows[2].mean['heldout']:.2f} |")
    assert list(made.checkpoints) == ["wanda", "besa"]
    text = [str(shallow_llama_folder / "heldout.txt")]
    page = made.page.read_text()
    assert page.lower().startswith("<!doctype html>")
    for row, model in zip(rows, [shallow_llama_folder, *made.checkpoints.values()], strict=True):
        measured = besa.evaluate(model, text, window=64, max_windows=10).perplexity["heldout"]
        assert row.mean["heldout"] == pytest.approx(measured, rel=1e-6)
        assert f"{measured:.2f}" in page


@pytest.mark.slow
def test_demo_goes_on_where_it_was_interrupted(
    tmp_path: Path, shallow_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    compress, calls = workspace.compress, []

    def interrupted(model: str, recipe: besa.Recipe, *arguments: object, **settings: object) -> object:
        calls.append(recipe.name)
        if calls == ["wanda", "besa"]:
            raise KeyboardInterrupt
        return compress(model, recipe, *arguments, **settings)

    monkeypatch.setattr(workspace, "compress", interrupted)
    with pytest.raises(Interrupted, match="the same command goes on"):
        run(out, shallow_llama_folder)
    run(out, shallow_llama_folder)
    assert calls == ["wanda", "besa", "besa"]
    monkeypatch.setattr(workspace, "evaluate", lambda *_, **__: pytest.fail("it was measured again"))
    (out / demo.PAGE).unlink()
    assert run(out, shallow_llama_folder).page.exists()
    assert len(calls) == 3


def test_demo_adds_to_its_own_folder_and_refuses_one_of_other_sizes(tmp_path: Path, shallow_llama_folder: Path) -> None:
    out, plan = tmp_path / "demo", replace(PLAN, recipes=("magnitude",))
    run(out, shallow_llama_folder, plan)
    more = run(out, shallow_llama_folder, plan, sparsity=0.6)
    assert [row.sparsity for row in more.comparison.rows] == pytest.approx([0.5, 0.6], abs=1e-4)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(BesaError, match=r"was made under other conditions \(max_windows\): choose another --out"):
        run(out, shallow_llama_folder, replace(plan, max_windows=5))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sparsity": 1.5}, "sparsity"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"texts": ["none.txt"]}, "none.txt"),
        ({"texts": ["c4"]}, "c4|hub|Hub"),
        ({"calibration": "none.txt"}, "none.txt"),
        ({"calibration": "short.txt"}, "tokens"),
        ({"device": "tpu"}, "device|compute"),
        ({"out": Path("x" * 300)}, "xxx"),
        ({"out": Path("file")}, "file cannot be written: .*/file is no folder"),
        ({"out": Path("model")}, "model is the folder of a model: choose another --out"),
    ],
)
def test_demo_refuses_before_it_works_and_leaves_nothing(
    tmp_path: Path, shallow_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("model").mkdir()
    for name in ("short.txt", "file", "model/config.json"):
        Path(name).write_text("Too short.")
    for work in ("compress", "evaluate"):
        monkeypatch.setattr(workspace, work, lambda *_, **__: pytest.fail("it has begun"))
    usual = {
        "out": Path("demo"), "plan": PLAN, "sparsity": 0.5, "texts": [str(shallow_llama_folder / "heldout.txt")],
        "calibration": str(shallow_llama_folder / "calibration.txt"),
    }  # fmt: skip
    with pytest.raises(BesaError, match=words):
        demo.run_demo(**usual | change)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model", "short.txt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "file"], "is no folder"),
        (["--sparsity", "2"], "sparsity"),
        (["--calibration", "none.txt"], "There is no text none.txt"),
        (["--ppl", "none.txt"], "There is no text none.txt"),
    ],
)
def test_demo_refuses_before_it_says_anything_or_opens_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(workspace, "locate", lambda *_, **__: pytest.fail("the model was opened"))
    result = called("demo", *arguments, folder=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert words in result.stderr


def test_demo_that_is_refused_or_stopped_before_its_first_result_leaves_nothing(
    tmp_path: Path, shallow_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (BesaError("The text is too short."), KeyboardInterrupt()):

        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(workspace, "evaluate", fail)
        with pytest.raises(type(error)):
            run(tmp_path / "demo", shallow_llama_folder)
        assert list(tmp_path.iterdir()) == []
