"""Completion as shells ask for it: the scripts of bash, zsh and fish, and what they are answered."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from besa.cli import completing
from besa.cli.options import Dtype
from besa.methods.shipped import shipped
from besa.system import devices

COMMAND = "import sys; from besa.cli import main; sys.argv[0] = 'besa'; main()"
BE = [name for name in shipped() if name.startswith("be")]
ASKED = {
    "besa prune model out --recipe be": BE,
    "besa compare model --recipes magnitude,be": [f"magnitude,{name}" for name in BE],
    "besa prune model out --dtype ": list(Dtype),
    "besa eval model --device c": ["cpu", "cuda"],
}


def asked(shell: str, line: str) -> list[str]:
    """What a shell offers for a line that is typed so far."""
    words = line.split(" ")
    environment = {
        "_BESA_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMMAND], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    if shell == "zsh":
        return done.stdout.split('"')[1::2]
    return done.stdout.split()


RECIPE, *_ = ASKED


@pytest.mark.parametrize(("shell", "line"), [*(("bash", line) for line in ASKED), ("zsh", RECIPE), ("fish", RECIPE)])
def test_shells_are_offered_what_there_is(shell, line):
    assert asked(shell, line) == ASKED[line]


def test_names_are_those_of_the_program():
    assert list(completing.DEVICES) == ["auto", *devices.TYPES]
    assert completing.recipe("") == shipped()
    assert completing.recipes("wanda,wan") == ["wanda,wanda-int4"]  # each once


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_completes_once_it_is_installed(tmp_path: Path):
    """As a user does it: install, begin a shell, press tab."""
    program = tmp_path / "besa"
    program.write_text(f"#!{sys.executable}\n{COMMAND}\n")
    program.chmod(0o755)
    environment = os.environ | {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = "besa --install-completion; source ~/.bashrc; "
    script += 'COMP_WORDS=(besa prune m o --recipe wan); COMP_CWORD=5; _besa_completion besa; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "wanda wanda-int4", done.stdout + done.stderr
