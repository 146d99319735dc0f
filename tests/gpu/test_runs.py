"""Whole runs on the device, against the CPU's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import besa
from besa import BesaError, Recipe
from besa.errors import Interrupted
from besa.methods.allocation.descent import Descent
from besa.methods.shipped import shipped
from besa.models import activations
from besa.models.blocks import send
from besa.storage.weights import WeightFiles
from besa.system.devices import available_bytes
from tests.gpu.conftest import TINY

TEXT, HELDOUT = str(TINY / "calibration.txt"), str(TINY / "heldout.txt")
SETTINGS: dict[str, Any] = {"samples": 8, "seqlen": 64, "batch": 4, "dtype": "float32"}
OVERLAP = 0.95  # of the pruned weights: sums of another order move weights at the edge, and the rates that are learned
PERPLEXITY = 0.03  # between the two results


def zeros_of(folder: Path) -> dict[str, torch.Tensor]:
    files = WeightFiles(folder)
    return {name: tensor == 0 for name, tensor in files.read(files.names) if tensor.dim() == 2}


def counted(folder: Path) -> list[int]:
    return [block["zeros"] for block in json.loads((folder / "besa_run.json").read_text())["blocks"]]


def coded(recipe: Recipe) -> bool:
    return recipe.quantization.coding is not None


@pytest.mark.parametrize("name", shipped())
def test_recipes_agree_with_the_cpu(device, tmp_path, name):
    settings = SETTINGS | {"dequantized": coded(Recipe.load(name))}
    for where in ("cpu", device):
        besa.compress(TINY, name, TEXT, out=tmp_path / str(where), device=where, **settings)
    ours, theirs = tmp_path / str(device), tmp_path / "cpu"
    zeros, rounded = sum(counted(theirs)), Recipe.load(name).sparsity == 0  # then zeros come from rounding alone
    assert sum(counted(ours)) == (pytest.approx(zeros, rel=0.01) if rounded else zeros)
    found, expected = zeros_of(ours), zeros_of(theirs)
    pruned = sum(int(zero.sum()) for zero in expected.values())
    assert sum(int((zero & found[key]).sum()) for key, zero in expected.items()) >= OVERLAP * pruned
    perplexities = [
        besa.evaluate(folder, [HELDOUT], window=64, device=where).perplexity["heldout"]
        for folder, where in ((ours, device), (theirs, "cpu"))
    ]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=PERPLEXITY)


@pytest.mark.parametrize("name", ["wanda", "wanda-int4"])
def test_packed_models_write_what_dense_ones_write(device, tmp_path, name):
    besa.compress(TINY, name, TEXT, out=tmp_path / "dense", device=device, **SETTINGS)
    besa.pack(tmp_path / "dense", tmp_path / "packed")
    for prompt in ("The city lies on the river", "In the year"):
        dense, packed = (
            besa.generate(tmp_path / form, prompt, max_new_tokens=40, device=device) for form in ("dense", "packed")
        )
        assert packed == dense
    tokens_NT = torch.arange(120).view(6, 20).to(device)  # more than a few rows
    with torch.no_grad():
        logits = [besa.load(tmp_path / form, device=device)(tokens_NT).logits.cpu() for form in ("dense", "packed")]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)


def test_a_journal_goes_on_only_on_its_device(device, tmp_path):
    def stop(done: int, _: int, state: str) -> None:
        if done == 2 and state != "embeddings":
            raise KeyboardInterrupt

    def prune(out: str, where: Any, **changes: Any) -> None:
        besa.compress(TINY, "wanda", TEXT, out=tmp_path / out, device=where, **SETTINGS | changes)

    prune("whole", device)
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        prune("stopped", device, progress=stop)
    if device.type != "cpu":
        with pytest.raises(BesaError, match=r"belongs to a run with device = .*, not 'cpu'"):
            prune("stopped", "cpu", resume=True)
    prune("stopped", device, resume=True)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "stopped" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["besa", "fast", "sparsegpt", "besa-int4"])
def test_the_host_seldom_waits(device, waits, monkeypatch, tmp_path, name):
    """At most once in a pass over the calibration set, and once in 16 steps of learning."""
    passes, learned = [], []
    descend = Descent.descend

    def descending(*arguments: Any) -> list[float]:
        with waits() as found:
            losses = descend(*arguments)
        learned.append((len(losses), found))
        return losses

    def sending(*arguments: Any, **options: Any) -> None:
        with waits() as found:
            send(*arguments, **options)
        passes.append(found)

    recipe = Recipe.load(name)
    if recipe.descent is not None:
        recipe = Recipe.load(name, overrides=["allocation.steps=17", "allocation.tolerance=0"])
    monkeypatch.setattr(Descent, "descend", descending)
    for module in ("besa.models.blocks", "besa.models.units", "besa.methods.targets.search"):
        monkeypatch.setattr(f"{module}.send", sending)
    besa.compress(TINY, recipe, TEXT, out=tmp_path / "out", device=device, dequantized=coded(recipe), **SETTINGS)
    assert len(passes) >= 2 * 8
    assert [found for found in passes if len(found) > 1] == []
    assert [(steps, found) for steps, found in learned if len(found) > steps / 16 + 1] == []
    assert (recipe.descent is not None) == bool(learned)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_agrees_with_the_cpu(device, tmp_path, dtype):
    settings = SETTINGS | {"dtype": dtype}
    for where in ("cpu", device):
        besa.compress(TINY, "besa", TEXT, out=tmp_path / str(where), device=where, **settings)
    assert sum(counted(tmp_path / str(device))) == sum(counted(tmp_path / "cpu"))
    perplexities = [
        besa.evaluate(tmp_path / str(where), [HELDOUT], window=64, device=where).perplexity["heldout"]
        for where in (device, "cpu")
    ]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=PERPLEXITY)


@pytest.mark.parametrize("place", ["host", "file"])
def test_hidden_states_elsewhere_change_nothing(device, monkeypatch, tmp_path, place):
    """Copies that go by streams of their own arrive before they are read, and are not overwritten before."""
    besa.compress(TINY, "sparsegpt", TEXT, out=tmp_path / "device", device=device, **SETTINGS)
    budget = 1000 if place == "file" else None
    if place == "host":
        monkeypatch.setattr(
            activations, "available_bytes", lambda where: available_bytes(where) if where.type == "cpu" else 0
        )
    besa.compress(TINY, "sparsegpt", TEXT, out=tmp_path / "away", device=device, activation_budget=budget, **SETTINGS)
    for path in (tmp_path / "device").glob("*.safetensors"):
        assert (tmp_path / "away" / path.name).read_bytes() == path.read_bytes()


def test_a_second_gpu_serves_as_well(device, tmp_path):
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("there is no second GPU")
    for where in ("cuda:0", "cuda:1"):
        besa.compress(TINY, "wanda-int4", TEXT, out=tmp_path / where, device=where, dequantized=True, **SETTINGS)
        assert torch.cuda.current_device() == 0
    for path in (tmp_path / "cuda:0").glob("*.safetensors"):
        assert (tmp_path / "cuda:1" / path.name).read_bytes() == path.read_bytes()


def test_models_of_codes_go_to_the_device(device, tmp_path):
    besa.compress(TINY, "wanda-int4", TEXT, out=tmp_path / "codes", device=device, **SETTINGS)
    model = besa.load(tmp_path / "codes", device=device)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {device.type}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "codes")
    assert besa.generate(model, "The city", tokenizer=tokenizer, max_new_tokens=5)


def test_sampling_leaves_the_random_numbers_of_the_program(device):
    if device.type != "cuda":
        pytest.skip("these are CUDA's")
    model, tokenizer = besa.load(TINY, device=device), AutoTokenizer.from_pretrained(TINY)
    before = torch.cuda.get_rng_state_all()
    texts = [
        besa.generate(model, "The city", tokenizer=tokenizer, temperature=1.0, seed=seed, max_new_tokens=12)
        for seed in (1, 2, 1)
    ]
    assert texts[0] == texts[2] != texts[1]
    assert all(map(torch.equal, torch.cuda.get_rng_state_all(), before))
