"""Each program of examples/, as a user runs it, on the tiny Llama."""

import importlib.util
import json
import socket
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

import besa
from besa.record import RunRecord

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
CALIBRATION, HELDOUT = str(TINY / "calibration.txt"), str(TINY / "heldout.txt")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Examples write into the working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def zeros(folder: Path) -> int:
    weights = load_file(folder / "model.safetensors")
    return sum(int((weight == 0).sum()) for name, weight in weights.items() if "_proj" in name)


def test_examples_are_short_run_here_and_on_the_page() -> None:
    paths = sorted(EXAMPLES.glob("*.py"))
    assert len(paths) == 6
    tests = Path(__file__).read_text(encoding="utf-8")
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    for path in paths:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, path
        assert f'example("{path.stem}")' in tests
        assert f"\n[examples/{path.name}](../examples/{path.name})\n" in page


def test_prune_in_memory(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert example("prune_in_memory").main(str(TINY), CALIBRATION, "wanda", seqlen=32) == 0.5
    assert "405,504 of 811,008 weights are zero now." in capsys.readouterr().out
    assert zeros(here / "pruned-in-memory") == 405_504


def test_own_calibration(here: Path) -> None:
    sentences = (TINY / "calibration.txt").read_text().split(". ")
    texts = [". ".join(sentences[place : place + 8]) for place in range(0, 80, 8)]
    lines = [json.dumps({"question": "What is there?", "answer": text}) for text in [*texts, "short"]]
    (here / "records.jsonl").write_text("\n".join(lines))
    calibration = example("own_calibration").main("records.jsonl", str(TINY), seqlen=64)
    assert (calibration.samples, calibration.seqlen) == (10, 64)
    record = RunRecord.of(here / "pruned-on-records")
    assert record is not None
    assert record.calibration["sha256"] == calibration.sha256
    assert record.calibration["source"] == "records.jsonl"


def test_own_importance() -> None:
    errors = example("own_importance").main(str(TINY), CALIBRATION, seqlen=64)
    assert errors == sorted(errors)
    blocks = besa.compress(TINY, "wanda", CALIBRATION, samples=8, seqlen=64).record.blocks
    assert errors[0] == sum(block.reconstruction_error for block in blocks) / len(blocks)


@pytest.mark.slow
def test_sweep_and_plot(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("sweep_and_plot")
    monkeypatch.setattr(module, "RECIPES", ("magnitude", "wanda"))  # the learning one takes long
    monkeypatch.setattr(module, "SPARSITIES", (0.3, 0.6))
    found = module.main(str(TINY), CALIBRATION, HELDOUT, seqlen=32)
    assert list(found) == ["magnitude", "wanda"]
    for recipe, values in found.items():
        assert values[0] < values[1]
        (again,) = besa.evaluate(
            here / "sweep" / f"{recipe}-0.6", [HELDOUT], window=32, max_windows=10
        ).perplexity.values()
        assert values[1] == again
    assert "</svg>" in (here / "sweep.svg").read_text()


@pytest.mark.slow
def test_pack_and_serve(here: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    written = example("pack_and_serve").main(str(TINY), CALIBRATION, seqlen=64, port=port)
    expected = besa.generate(here / "packed", "The city lies on the river", chat=False, max_new_tokens=12)
    assert written.strip() == expected.strip()


def test_finetune_with_masks(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another test of this process may have made the pretend accelerator, whose memory cannot be pinned.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    before, after = example("finetune_with_masks").main(str(TINY), CALIBRATION, HELDOUT, seqlen=32, steps=10)
    assert after < before
    assert zeros(here / "trained") == zeros(here / "pruned") == 405_504
