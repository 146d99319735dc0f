"""Standard streams that are full, closed or of few characters, and arguments that are no text."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BESA = [sys.executable, "-m", "besa"]
TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full here")


def shell(command: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in which `$@` is the call of besa."""
    call = [*BESA, *map(str, arguments)]
    return subprocess.run(
        ["bash", "-c", command, "bash", *call],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


@full
@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["plan", str(TINY)]])
def test_a_full_device_behind_standard_output(arguments: list[str]) -> None:
    result = shell('"$@" > /dev/full', *arguments)
    assert (result.returncode, result.stderr) == (
        2,
        "besa: Standard output cannot be written: No space left on device.\n",
    )


@full
def test_what_is_told_on_the_way_may_be_lost() -> None:
    result = shell('"$@" 2> /dev/full', "prune", "none")
    assert (result.returncode, result.stdout) == (2, "")
    result = shell('"$@" 2> /dev/full', "--help")
    assert result.returncode == 0
    assert "prune" in result.stdout


def test_a_reader_that_has_had_enough() -> None:
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([*BESA, "--help"], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
def test_streams_that_are_closed(tmp_path: Path, tiny_llama_folder: Path) -> None:
    """No file takes their place, and gets what is meant for them."""
    result = shell('"$@" <&- >&- 2>&-', "inspect", tiny_llama_folder, "--json", tmp_path / "found.json")
    assert result.returncode == 0
    assert (tmp_path / "found.json").read_text().rstrip().endswith("}")
    assert shell('"$@" >&- 2>&-', "prune", "none").returncode == 2


def test_characters_that_the_terminal_lacks_are_escaped() -> None:
    result = shell('"$@"', "prune", "ü", "out", "--sparsity", "x\x1b[31m", PYTHONIOENCODING="ascii")
    assert result.returncode == 2
    assert "\x1b" not in result.stderr
    assert shell('"$@"', "--help", PYTHONIOENCODING="ascii").returncode == 0


def test_arguments_that_are_no_text(tmp_path: Path) -> None:
    result = subprocess.run(
        [*BESA, "prune", "model", b"\xff"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (
        2,
        "besa: The argument '\\udcff' is not UTF-8: rename the file or change the text.\n",
    )
