"""AddressSanitizer and UndefinedBehaviorSanitizer over the C++ kernels, in a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from besa.kernels import attention, build, native, norm, row_codes, sparse_native

pytestmark = pytest.mark.slow
DRIVER = Path(__file__).with_name("sanitized.py")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory):
    """Runs the driver with the libraries of both sanitizers."""
    compiler = next((path for name in build.COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip(f"{compiler} has no sanitizers")
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps much to its end
        "BESA_CACHE": str(tmp_path_factory.mktemp("sanitized")),
        "CXX": compiler,
        "PYTHONPATH": os.pathsep.join([str(DRIVER.parents[2]), os.environ.get("PYTHONPATH", "")]),
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(DRIVER), *arguments], env=environment, capture_output=True, text=True, check=False
        )

    return run


def test_kernels_keep_to_their_memory_and_to_the_language(sanitized) -> None:
    result = sanitized()
    assert result.returncode == 0, result.stderr[-3000:]
    called, *paths = result.stdout.split()
    assert paths == [*sparse_native.paths(), *native.paths()]
    steps = [*attention.paths(), *norm.paths(), *row_codes.paths()]
    assert int(called) == 1500 * (2 * len(sparse_native.paths()) + 4 * len(native.paths()) + len(steps) + 1)


def test_the_sanitizers_are_at_work(sanitized) -> None:
    result = sanitized("overrun")
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
    assert "kernels.cpp" in result.stderr
