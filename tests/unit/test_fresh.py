"""Where the check of a release looks for other Pythons."""

import os
import sys
from pathlib import Path

import pytest

from release.fresh import interpreter


def program(path: Path, line: str) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


@pytest.mark.skipif(os.name == "nt", reason="the programs are scripts of a shell")
def test_a_python_of_pyenv_is_found_though_its_shim_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim = program(tmp_path / "shims" / "python3.99", "exit 127")
    monkeypatch.setenv("PATH", str(shim.parent))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert interpreter("3.99") is None
    there = program(tmp_path / "versions" / "3.99.1" / "bin" / "python", "echo 3.99")
    assert interpreter("3.99") == str(there)
    assert interpreter("3.9") is None
    shim.write_text("#!/bin/sh\necho 3.99\n")
    assert interpreter("3.99") == str(shim)
    assert interpreter(f"{sys.version_info.major}.{sys.version_info.minor}") == sys.executable
