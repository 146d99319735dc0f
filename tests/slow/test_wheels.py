"""A wheel with compiled kernels: its libraries are loaded, and no compiler is asked."""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from besa.kernels import build

ROOT = Path(__file__).parents[2]
compiled = pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)), reason="there is no C++ compiler here")


@pytest.mark.slow
@compiled
def test_kernels_come_from_the_wheel_of_this_platform(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"HATCH_BUILD_HOOK_ENABLE_CUSTOM": "true"}, check=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.endswith(f"_{platform.machine()}.whl") and "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        assert (
            "Root-Is-Purelib: false"
            in archive.read(next(name for name in archive.namelist() if name.endswith("/WHEEL"))).decode()
        )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "BESA_CACHE": str(tmp_path / "cache")}
    said = subprocess.run(
        [sys.executable, ROOT / "release" / "prebuilt.py"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.startswith(f"{len([*build.HERE.glob('*.cpp')])} libraries; instruction sets: ")
    assert not (tmp_path / "cache").exists()
