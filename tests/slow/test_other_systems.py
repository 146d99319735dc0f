"""A run as on macOS and on Windows, as far as one Linux can pretend to be them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "assets" / "tiny-llama"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux tells which files are open")
@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_a_model_is_pruned_measured_shown_and_verified(system, tmp_path):
    command = [sys.executable, ROOT / "tests" / "other_system.py", system, TINY, TINY / "calibration.txt", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "report.html"]
    assert {"besa_run.json", "besa_eval.json", "config.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert not [*tmp_path.rglob("*.partial"), *tmp_path.rglob("besa.lock")]
