"""Triton kernels as machine code (tests/compiled.py): they compile, fit into registers, and take what is written."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import besa.kernels
from benchmarks import gpu_kernels
from benchmarks.gpu_kernels import MULTIPROCESSORS

pytest.importorskip("triton")


@pytest.fixture(scope="module", params=[(90,), pytest.param((80, 100, 120), marks=pytest.mark.slow)], ids=str)
def architectures(request):
    return request.param


@pytest.fixture(scope="module")
def compiled(request, architectures):
    """What is compiled now; Triton keeps it for the next time in pytest's cache, by source and version."""
    return gpu_kernels.results(architectures, request.config.cache.mkdir("triton"))


def kernels_of(text):
    """The names of the kernels in a module: functions that `triton.jit` decorates and no other of these calls."""
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    jitted = [node for node in functions if any("triton.jit" in ast.unparse(by) for by in node.decorator_list)]
    called = {ast.unparse(node.func) for one in jitted for node in ast.walk(one) if isinstance(node, ast.Call)}
    return {one.name.lstrip("_") for one in jitted if one.name not in called}


def test_every_kernel_compiles_for_every_architecture(architectures, compiled):
    sources = [path.read_text() for path in (Path(besa.kernels.__file__).parent / "gpu").rglob("*.py")]
    expected = set().union(*map(kernels_of, sources))
    assert {"masked", "binned"} <= expected
    for architecture in architectures:
        assert {one["kernel"] for one in compiled["kernels"] if one["architecture"] == architecture} == expected


def test_nothing_spills(compiled):
    assert [one for one in compiled["kernels"] if one["spilled"]] == []


def test_the_written_file_is_up_to_date(architectures, compiled):
    written = json.loads(gpu_kernels.RESULTS.read_text())
    if written["triton"] != compiled["triton"]:
        pytest.skip("another Triton than that of the written file")
    kernels = [one for one in written["kernels"] if one["architecture"] in architectures]
    assert kernels == compiled["kernels"], "run python -m benchmarks.gpu_kernels"


WRONG = """
from typing import Any
import torch, triton, triton.language as tl
from tests.compiled import Compiler, empty

@triton.jit
def annotated(x: Any):
    tl.store(x, 0)

@triton.jit
def crowded(x, BLOCK: tl.constexpr):
    values = tl.load(x + tl.arange(0, BLOCK))
    tl.store(x + tl.arange(0, BLOCK), values * tl.sum(values))

compiler = Compiler([90])
compiler.compile(lambda: crowded[1,](empty(4096), BLOCK=2048, num_warps=1, maxnreg=32))
assert all(one.spilled for one in compiler.found), compiler.found
compiler.compile(lambda: annotated[1,](empty(1)))
"""


def test_what_a_gpu_would_refuse_or_spill_is_seen(tmp_path):
    """As of 0.1.0: the interpreter takes any annotation, the compiler none."""
    (tmp_path / "wrong.py").write_text(WRONG)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, tmp_path / "wrong.py"], env=environment, capture_output=True, text=True)
    assert "Cannot access global variable Any" in done.stderr


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "warps", "occupancy"),
    [
        (80, 32, 0, 4, 1.0),  # 16 programs of 4 warps
        (80, 33, 0, 4, 0.75),  # 40 registers a thread: 51 warps, 12 programs
        (80, 255, 0, 8, 0.125),  # one program: 256 registers a thread allow 8 warps
        (90, 16, 113 << 10, 4, 0.125),  # 228 KiB hold two programs of 114 KiB
        (120, 16, 0, 1, 0.5),  # 24 programs of one warp
        (100, 16, 228 << 10, 4, 0.0),  # no program at all
    ],
)
def test_occupancy(architecture, registers, shared, warps, occupancy):
    assert MULTIPROCESSORS[architecture].occupancy(registers, shared, warps) == occupancy
