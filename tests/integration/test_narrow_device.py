"""A device without float64, as Apple's GPUs: nothing needs it there, and results are the CPU's within rounding."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import besa
from besa import Recipe
from besa.counting.precision import widest
from tests import pretend

pytestmark = pytest.mark.usefixtures("torchs_own_products")
RUNS = [
    pytest.param("wanda", [], marks=pytest.mark.slow),
    ("sparsegpt", []),
    ("besa", ["allocation.steps=3"]),
    pytest.param("besa-int4", ["allocation.steps=3"], marks=pytest.mark.slow),
    ("fast", []),
    pytest.param("fast", ["targets.method=search"], marks=pytest.mark.slow),
    pytest.param(
        "wanda",
        ["sparsity=0.2", "allocation.method=structured", "targets.method=sensitivity"],
        marks=pytest.mark.slow,
    ),
    ("depth", ["allocation.layers=mlp", "allocation.blocks=2"]),
    pytest.param("wanda", ["allocation.method=nm", "allocation.mixed=true"], marks=pytest.mark.slow),
]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pretend.numbers, "float64", False)
    widest.cache_clear()
    yield
    widest.cache_clear()


@pytest.mark.parametrize(("recipe", "changes"), RUNS)
def test_it_prunes_as_the_cpu_does(narrow: None, recipe: str, changes: list[str], shallow_llama_folder: Path) -> None:
    records = [
        besa.compress(
            shallow_llama_folder,
            Recipe.load(recipe, None, changes),
            str(shallow_llama_folder / "calibration.txt"),
            samples=8,
            seqlen=64,
            batch=4,
            dtype="float32",
            device=device,
        ).record
        for device in ("cpu", "pretend")
    ]
    on_cpu, there = records
    assert widest(pretend.DEVICE) == torch.float32
    assert abs(there.zeros - on_cpu.zeros) <= (0 if recipe != "besa-int4" else on_cpu.zeros * 1e-3)
    for block, other in zip(on_cpu.blocks, there.blocks, strict=True):
        assert other.reconstruction_error == pytest.approx(block.reconstruction_error, rel=0.05)
