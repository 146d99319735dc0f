"""Runs of one to three ranks, of which one is killed 20 times: see kill_ranks_and_resume.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from besa.api import compress

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "assets" / "tiny-llama"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_killed_at_random_and_resumed_by_another_number_of_ranks(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((TINY / "calibration.txt").read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    script = Path(__file__).with_name("kill_ranks_and_resume.py")
    result = subprocess.run(
        [sys.executable, script, TINY, text, tmp_path, "0", "20"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=1800,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    kills = json.loads(result.stdout)
    assert len(kills) >= 20
    assert {kill["way"] for kill in kills} == {"time", "meeting", "touch"}
    assert {kill["ranks"] for kill in kills} == {1, 2, 3}
    assert len({kill["blocks"] for kill in kills}) > 3  # at various moments
    whole = tmp_path / "whole"
    compress(str(TINY), "besa", str(text), out=whole, samples=7, seqlen=32, batch=2, dtype="float32")
    for run in {kill["run"] for kill in kills}:
        pruned = tmp_path / f"out{run}"
        assert (pruned / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        assert not pruned.with_name(f"out{run}.partial").exists()
