"""Peak memory of real runs, on random models of a few hundred million weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.random_model import TOKENIZER, config, write

pytestmark = pytest.mark.slow


def peak(model: Path | str, out: Path, *settings: str) -> tuple[int, int]:
    """Bytes measured by a run in a process of its own, and bytes planned."""
    besa = [sys.executable, "-m", "besa"]
    plan = out.with_suffix(".json")
    subprocess.run([*besa, "plan", str(model), *settings, "--json", str(plan)], check=True)
    text = ["--calibration", str(TOKENIZER / "calibration.txt")]
    subprocess.run([*besa, "prune", str(model), str(out), *settings, *text], check=True)
    record = json.loads((out / "besa_run.json").read_text())
    return record["peak_memory_bytes"], json.loads(plan.read_text())["memory_bytes"]


def test_memory_is_flat_in_depth_and_as_planned(tmp_path: Path) -> None:
    measured = {}
    for blocks in (2, 6):
        model = tmp_path / f"{blocks}"
        write(model, config("1B", blocks))
        measured[blocks], planned = peak(model, tmp_path / f"out{blocks}", "--samples", "4", "--seqlen", "128")
        assert planned == pytest.approx(measured[blocks], rel=0.15)
    assert measured[6] == pytest.approx(measured[2], rel=0.1)


def test_a_gguf_file_takes_what_is_planned(tmp_path: Path) -> None:
    measured, planned = peak("smollm2", tmp_path / "out", "--recipe", "wanda", "--samples", "4", "--seqlen", "128")
    assert planned == pytest.approx(measured, rel=0.15)
