"""Commands that are killed, run out of disk, or run twice at once: see kill_and_repeat.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "assets" / "tiny-llama"
WITHOUT_THREADS = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def run(commands: str, moments: int, folder: Path) -> dict[str, dict[str, int]]:
    text = folder.parent / f"{folder.name}.txt"
    text.write_text((TINY / "calibration.txt").read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    script = Path(__file__).with_name("kill_and_repeat.py")
    result = subprocess.run(
        [sys.executable, script, commands, TINY, text, folder, "0", str(moments)],
        capture_output=True,
        text=True,
        env=WITHOUT_THREADS,
        timeout=1800,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, dict[str, int]] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_nothing_half_written_appears_and_the_next_run_is_as_good(tmp_path: Path) -> None:
    stops = {"died": 1, "filled": 1}
    commands = ["pack", "unpack", "shrink", "compare"]
    assert run(",".join(commands), 1, tmp_path) == dict.fromkeys(commands, stops)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pack", "unpack", "shrink", "compare"])
def test_nothing_half_written_appears_at_any_moment(command: str, tmp_path: Path) -> None:
    stops = run(command, 24, tmp_path)[command]
    assert stops["died"] == 24
    assert stops["filled"] >= 12
