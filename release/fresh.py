"""Install the wheel of `dist/` in fresh environments, with and without each extra, and prune the demo's first block.

`python release/fresh.py [PYTHON ...]`, such as `3.11 3.12`; without arguments every Python that besa is released for.
An interpreter, or what an extra needs, that is not on this machine is named and left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
MODULES = {"data": "datasets", "eval": "lm_eval", "serve": "fastapi", "vllm": "vllm"}  # what each extra brings


def interpreter(version: str) -> str | None:
    """The path of a Python on this machine: that which runs this, or from PATH, uv or pyenv."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    return next((path for path in _candidates(version) if _is(path, version)), None)


def _candidates(version: str) -> Iterator[str]:
    if path := shutil.which(f"python{version}"):
        yield path
    if uv := shutil.which("uv"):
        found = subprocess.run([uv, "python", "find", "--no-python-downloads", version], capture_output=True, text=True)
        yield found.stdout.strip()
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python")))


def _is(path: str, version: str) -> bool:
    """Whether a program is this Python; pyenv puts programs on PATH for versions that are not switched on."""
    command = [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() == version
    except OSError:
        return False


def check(python: str, wheel: Path, extra: str | None) -> None:
    """Make an environment, install, and prune the first block.

    Raises:
        CalledProcessError: one of these failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([python, "-m", "venv", scratch], check=True)
        programs = Path(scratch, "Scripts" if os.name == "nt" else "bin")
        own = programs / ("python.exe" if os.name == "nt" else "python")
        wanted = f"{wheel}[{extra}]" if extra else str(wheel)
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

        def run(*command: str | Path) -> None:
            subprocess.run(command, check=True, cwd=scratch, env=clean, stdout=subprocess.DEVNULL)

        run(own, "-m", "pip", "install", "--quiet", wanted)
        run(programs / "besa", "--help")
        run(own, "-c", f"import {MODULES[extra] if extra else 'besa'}")
        run(own, ROOT / "release" / "first_block.py")


def main(versions: list[str]) -> int:
    """Check all pairs of Python and extra; returns the exit code."""
    wheels = sorted((ROOT / "dist").glob("*-py3-none-any.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        print("There is no wheel: run `make dist`.", file=sys.stderr)
        return 2
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [None, *(name for name in project["optional-dependencies"] if name in MODULES)]
    failed = 0
    for version in versions:
        python = interpreter(version)
        for extra in extras:
            name = f"Python {version}, {f'extra {extra}' if extra else 'no extra'}"
            if python is None:
                print(f"{name}: left out, this Python is not here")
            elif extra == "vllm" and shutil.which("nvidia-smi") is None:
                print(f"{name}: left out, it is for machines with a GPU")
            else:
                try:
                    check(python, wheels[-1], extra)
                    print(f"{name}: installed, first block pruned", flush=True)
                except subprocess.CalledProcessError as error:
                    failed += 1
                    print(f"{name}: failed at {error.cmd}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(PYTHONS)))
