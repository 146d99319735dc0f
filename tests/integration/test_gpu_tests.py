"""The tests of `make test-gpu` where there is no GPU: they say so, and work on another device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir", "tests/gpu", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_without_a_gpu_one_sentence_says_so() -> None:
    done = run("tests/gpu")
    assert done.returncode == 0
    assert "There is no CUDA device that torch can use here: no test of tests/gpu was run." in done.stdout
    assert "deselected" in done.stdout


@pytest.mark.slow
def test_the_tests_themselves_work() -> None:
    """Those that take seconds; `BESA_TEST_DEVICE=pretend make test-gpu` runs all."""
    done = run("tests/gpu", "-k", "test_kernels or test_sparse or journal or second", BESA_TEST_DEVICE="pretend")
    assert done.returncode == 0, done.stdout[-3000:]
