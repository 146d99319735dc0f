"""Build the wheel that fits everywhere and the source distribution twice, and keep them if their bytes are the same.

`python release/dist.py [FOLDER]`; wheels with compiled kernels come from cibuildwheel (pyproject.toml).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def build(folder: Path, epoch: str) -> dict[str, str]:
    """Build into a folder; returns the SHA-256 of each file."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"SOURCE_DATE_EPOCH": epoch}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def epoch() -> str:
    """The time that files get: SOURCE_DATE_EPOCH, or that of the last commit, or of the changelog without git."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return given
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    committed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return committed or str(int((ROOT / "CHANGELOG.md").stat().st_mtime))


def main(folder: Path) -> int:
    """Build twice; returns the exit code."""
    with tempfile.TemporaryDirectory(dir=ROOT) as scratch:
        first, second = (build(Path(scratch, name), epoch()) for name in ("first", "second"))
        if first != second:
            print(f"Two builds of the same sources differ: {first} and {second}.", file=sys.stderr)
            return 1
        folder.mkdir(parents=True, exist_ok=True)
        for name, digest in first.items():
            Path(scratch, "first", name).replace(folder / name)
            print(f"{digest}  {folder / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist")))
