"""The benchmark for GPUs at tiny sizes on the CPU: what it writes, and that it refuses to go without a GPU."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import gpu
from benchmarks.gpu import Limits
from benchmarks.operations import Operation, Seen
from besa import Recipe

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
LIMITS = Limits(bandwidth=1e9, half=1e9, tf32=1e9, float32=1e9)


@pytest.mark.slow
def test_without_a_gpu_one_sentence_says_so() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "There is no CUDA device that torch can use here: benchmarks.gpu measures only on a GPU."
    )


def test_limits_are_measured() -> None:
    found = gpu.limits(CPU, large=1 << 20, side=64)
    assert min(found.bandwidth, found.half, found.tf32, found.float32) > 1e6


def test_the_least_time_is_by_products_or_bytes() -> None:
    operations = Counter({Operation("mm", "half", 3e9, 1e9): 2, Operation("add", "other", 0, 5e8): 4})
    assert LIMITS.seconds(Seen(operations)) == pytest.approx(2 * 3 + 4 * 0.5)


def test_every_kernel_is_measured() -> None:
    cases = list(gpu.kernel_cases(CPU, LIMITS, [(8, 256)], rounds=2, cold=1 << 14))
    assert Counter(case["kernel"] for case in cases) == {
        "masked": 1,
        "binned": 1,
        "swept": 1,
        "unpack": len(gpu.KINDS),
        "multiply": len(gpu.KINDS) * len(gpu.BATCHES),
    }
    assert all(case["seconds"] > 0 and case["share_of_bytes"] > 0 for case in cases)
    masked = next(case for case in cases if case["kernel"] == "masked")
    assert masked["share_of_bytes"] == pytest.approx(8 * 256 * 6 / 1e9 / masked["seconds"])
    multiplied = [case for case in cases if case["kernel"] == "multiply"]
    assert all(case["times_torch"] == case["torch_seconds"] / case["seconds"] for case in multiplied)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["besa", "fast"])
def test_a_block_is_measured_by_phase(name: str) -> None:
    settings = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        dtype="bfloat16",
    )
    recipe = Recipe.load(name)
    if recipe.descent is not None:
        recipe = Recipe.load(name, overrides=["allocation.steps=3"])
    found = gpu.block(CPU, LIMITS, settings, recipe, samples=4, seqlen=16)
    assert found["recipe"] == name
    assert {"statistics", "rank", "allocate", "propagate"} <= set(found["phases"])
    assert all(phase["seconds"] > 0 for phase in found["phases"].values())
    assert found["phases"]["propagate"]["share"] > 0
    assert found["seconds"] == pytest.approx(sum(phase["seconds"] for phase in found["phases"].values()), rel=0.2)
    assert found["before_seconds"] > 0
