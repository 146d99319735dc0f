"""The demo, with the tiny Llama in the place of the embedded model."""

import json
from pathlib import Path

import pytest

from besa.errors import BesaError
from besa.studies import demo

PLAN = demo.Plan(("wanda", "besa"), samples=8, seqlen=64, window=64, max_windows=10)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tiny_llama_folder: Path) -> None:
    monkeypatch.setattr(demo, "EMBEDDED", str(tiny_llama_folder))


def run(out: Path, folder: Path, sparsity: float = 0.5) -> tuple[Path, list[demo.Row]]:
    return demo.run_demo(out, PLAN, sparsity, [str(folder / "heldout.txt")], str(folder / "calibration.txt"))


def test_demo_ends_with_checkpoints_a_table_and_a_page(tmp_path: Path, tiny_llama_folder: Path) -> None:
    out = tmp_path / "demo"
    page, rows = run(out, tiny_llama_folder)
    assert [row.method for row in rows] == ["dense", "wanda", "besa"]
    assert [row.record and row.record.sparsity for row in rows] == [None, 0.5, 0.5]
    assert page.read_text().lower().startswith("<!doctype html>")
    for row in rows:
        measured = json.loads((out / row.method / "besa_eval.json").read_text())
        assert measured["perplexity"]["heldout"] == row.evaluation.perplexity["heldout"]
    table = (out / "results.md").read_text().splitlines()
    assert table[0] == "| method | sparsity | heldout | × | seconds |"
    assert table[2].startswith("| dense | 0 % |")
    assert table[4].startswith(f"| besa | 50.0000% | {rows[2].evaluation.perplexity['heldout']:.2f} |")


def test_demo_goes_on_where_it_was_interrupted(
    tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "demo"
    compress, calls = demo.compress, []

    def interrupted(model: str, recipe: str, *arguments: object, **settings: object) -> object:
        calls.append(recipe)
        if calls == ["wanda", "besa"]:
            raise KeyboardInterrupt
        return compress(model, recipe, *arguments, **settings)

    monkeypatch.setattr(demo, "compress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(out, tiny_llama_folder)
    run(out, tiny_llama_folder)
    assert calls == ["wanda", "besa", "besa"]


def test_demo_refuses_a_folder_that_is_not_its_own(tmp_path: Path, tiny_llama_folder: Path) -> None:
    run(tmp_path / "demo", tiny_llama_folder)
    with pytest.raises(BesaError, match="not this demo's"):
        run(tmp_path / "demo", tiny_llama_folder, sparsity=0.6)
    with pytest.raises(BesaError, match="not this demo's"):
        run(tmp_path, tiny_llama_folder)


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
        ({"out": Path("file")}, "file exists already"),
    ],
)
def test_demo_refuses_before_it_works_and_leaves_nothing(
    tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("short.txt", "file"):
        Path(name).write_text("Too short.")
    for work in ("compress", "evaluate"):
        monkeypatch.setattr(demo, work, lambda *_, **__: pytest.fail("it has begun"))
    usual = {
        "out": Path("demo"), "plan": PLAN, "sparsity": 0.5, "texts": [str(tiny_llama_folder / "heldout.txt")],
        "calibration": str(tiny_llama_folder / "calibration.txt"),
    }  # fmt: skip
    with pytest.raises(BesaError, match=words):
        demo.run_demo(**usual | change)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "short.txt"]


def test_demo_that_is_refused_or_stopped_before_its_first_result_leaves_nothing(
    tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (BesaError("The text is too short."), KeyboardInterrupt()):

        def fail(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(demo, "evaluate", fail)
        with pytest.raises(type(error)):
            run(tmp_path / "demo", tiny_llama_folder)
        assert list(tmp_path.iterdir()) == []
