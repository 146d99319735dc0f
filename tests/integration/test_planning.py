"""What a plan says, against what a run then does."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import FalconConfig, LlamaConfig, MixtralConfig, MixtralForCausalLM

import besa
from besa import Calibration
from besa.cli import show
from besa.methods.recipe import Recipe
from besa.planning.shapes import _LiveBytes
from besa.record import RunRecord
from besa.report import load_run, render
from tests import pretend

LLAMA_70B = LlamaConfig(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    dtype="float16",
)
FALCON_180B = FalconConfig(
    vocab_size=65024,
    hidden_size=14848,
    num_hidden_layers=80,
    num_attention_heads=232,
    num_kv_heads=8,
    new_decoder_architecture=True,
    dtype="bfloat16",
)


def test_counts_are_those_of_the_run(tiny_llama_folder: Path, tmp_path: Path) -> None:
    sizes = {"samples": 16, "seqlen": 32, "sparsity": 0.6}
    planned = besa.plan(tiny_llama_folder, "besa", out=tmp_path, **sizes)
    text = str(tiny_llama_folder / "calibration.txt")
    record = besa.compress(tiny_llama_folder, "besa", text, out=tmp_path / "out", **sizes).record
    assert (planned.prunable_weights, planned.zeros) == (record.weights, record.zeros)
    assert planned.model_sparsity == record.model_sparsity == record.zeros / record.model["parameters"]
    assert planned.dense == record.dense == {}
    assert planned.architecture == record.model["architecture"]
    assert (planned.blocks, planned.parameters) == (len(record.blocks), record.model["parameters"])
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert planned.checkpoint_bytes <= written < planned.checkpoint_bytes + 20_000  # the header
    assert planned.activation_bytes == 1.5 * 16 * 32 * 96 * 4  # the dense path for half of each sequence
    assert planned.forward_passes == 0.5 + 2 + 3 * 0.5 * 88 / 16
    assert planned.fits
    assert planned.gpu_memory_bytes is None


@pytest.mark.parametrize(
    ("config", "weights", "gigabytes"),
    [
        (LLAMA_70B, 80 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192), 80),
        (FALCON_180B, 80 * (14848 * (14848 + 2 * 8 * 64) + 14848**2 + 8 * 14848**2), 80),
    ],
    ids=["LLaMA-2-70B", "Falcon-180B"],
)
def test_the_largest_models_of_the_paper_fit_one_gpu_of_80_gb(config, weights, gigabytes, tmp_path) -> None:
    config.save_pretrained(tmp_path)
    planned = besa.plan(tmp_path, "besa", device="cuda", out=tmp_path)
    assert planned.prunable_weights == weights
    assert planned.zeros == weights // 2
    block = 2 * weights / 80
    assert 3 * block < planned.gpu_memory_bytes < gigabytes * 1e9  # weights, masked weights, importance, ranks
    assert planned.checkpoint_bytes > 2 * weights
    assert not planned.fits
    assert planned.lacking


def test_activations_beyond_the_budget_go_to_disk(tmp_path: Path) -> None:
    LLAMA_70B.save_pretrained(tmp_path)
    near, far = (besa.plan(tmp_path, out=tmp_path, activation_budget=size) for size in (10**15, 1))
    assert near.activation_bytes == far.activation_bytes == 1.5 * 128 * 2048 * 8192 * 2
    assert near.activation_places == {"device": 0, "host": near.activation_bytes, "file": 0}
    assert far.activation_places == {"device": 0, "host": 0, "file": far.activation_bytes}
    assert near.memory_bytes - far.memory_bytes == pytest.approx(near.activation_bytes, rel=0.05)
    assert far.disk_bytes - near.disk_bytes == near.activation_bytes


def test_hidden_states_are_planned_where_they_will_be(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """As many on the device as have room there, then on the host, then on the disk."""
    pruned, dense = 64 * 64 * 96 * 4, 64 * 32 * 96 * 4
    for budget, expected in {
        pruned + dense: (pruned + dense, 0, 0),
        pruned + dense - 1: (pruned, dense, 0),
        pruned - 1: (dense, 0, pruned),
        dense - 1: (0, 0, pruned + dense),
    }.items():
        sizes = {"samples": 64, "seqlen": 64, "device": "pretend", "activation_budget": budget}
        plan = besa.plan(tiny_llama_folder, "besa", out=tmp_path, **sizes)
        assert plan.activation_places == dict(zip(("device", "host", "file"), expected, strict=True))
        assert plan.activation_bytes == pruned + dense
        rest = plan.gpu_memory_bytes - expected[0]
        assert (
            rest
            == besa.plan(tiny_llama_folder, "besa", out=tmp_path, **sizes | {"activation_budget": 0}).gpu_memory_bytes
        )
    monkeypatch.setattr(pretend.memory, "free", 4 * (pruned + dense) + 3)  # a quarter of it
    plan = besa.plan(tiny_llama_folder, "besa", out=tmp_path, samples=64, seqlen=64, device="pretend")
    assert plan.activation_places == {"device": pruned + dense, "host": 0, "file": 0}
    assert plan.fits
    monkeypatch.setattr(pretend.memory, "total", plan.gpu_memory_bytes - 1)
    plan = besa.plan(tiny_llama_folder, "besa", out=tmp_path, samples=64, seqlen=64, device="pretend")
    assert plan.lacking == [f"GPU memory ({pretend.memory.total / 1e9:.1f} GB)"]


def test_memory_that_cpu_and_gpu_share_is_planned_once(tiny_llama_folder: Path, tmp_path: Path) -> None:
    sizes = {"samples": 64, "seqlen": 64, "out": tmp_path, "batch": 4, "activation_budget": 1 << 30}
    cpu, mps = (besa.plan(tiny_llama_folder, "besa", device=device, **sizes) for device in ("cpu", "mps"))
    assert mps.gpu_memory_bytes is None
    assert mps.activation_places == {"device": cpu.activation_bytes, "host": 0, "file": 0}
    assert mps.memory_bytes == pytest.approx(cpu.memory_bytes, rel=0.02)  # of the process, which grows as it works


def test_a_gpu_that_is_not_here_is_planned_without_a_limit(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    LLAMA_70B.save_pretrained(tmp_path)
    plan = besa.plan(tmp_path, device="cuda:3", out=tmp_path)
    assert plan.activation_places == {"device": 1.5 * 128 * 2048 * 8192 * 2, "host": 0, "file": 0}
    assert "GPU memory (there is none)" in plan.lacking


@pytest.mark.parametrize(
    ("recipe", "passes", "streams"),
    [
        ("wanda", 2.03125, 1.03125),
        ("sparsegpt", 2.03125, 1.03125),
        ("besa", 0.5 + 2 + 3 * 0.5 * 88 / 64, 1.5),
        ("fast", 2.03125 + 3 / 8 + 2 / 4, 9 / 8),  # the inputs of eight blocks and the last outputs, an eighth of each
        ("best", 3 + 3 / 8 + 2 / 4 + 8 * (3 * 15 / 16 + 1 / 16) + 1 / 16, 2),
    ],
)
def test_recipes_differ_in_what_they_take(recipe, passes, streams, tiny_llama_folder) -> None:
    planned = besa.plan(tiny_llama_folder, recipe, samples=64, seqlen=64)
    assert planned.forward_passes == passes
    assert planned.activation_bytes == streams * 64 * 64 * 96 * 4


@pytest.mark.parametrize(("strengths", "streams"), [([0, 1], 9 / 8), ([place / 14 for place in range(14)], 16 / 8)])
def test_trials_are_planned_beside_each_other(strengths, streams, tiny_llama_folder) -> None:
    recipe = Recipe.load("wanda", None, ["targets.method=search", f"targets.strengths={strengths}"])
    planned = besa.plan(tiny_llama_folder, recipe, samples=64, seqlen=64)
    assert planned.forward_passes == 2.03125 + (3 + 1 + len(strengths)) / 8
    assert planned.activation_bytes == streams * 64 * 64 * 96 * 4


def test_experts_are_planned_without_values(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        dtype="float32",
    )
    config.save_pretrained(tmp_path)
    planned = besa.plan(tmp_path, "besa", samples=4, seqlen=32)
    assert planned.prunable_weights == 2 * (2 * 64 * 64 + 2 * 64 * 8 * 16 + 8 * 3 * 64 * 96)


def test_what_stays_dense_is_told_by_plan_record_terminal_and_report(tiny_tokenizer: Any, tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "dense")
    recipe = Recipe.load("wanda").model_copy(update={"skip": ("*.k_proj",)})
    tokens = Calibration(torch.arange(64).reshape(4, 16), "text", 0)
    planned = besa.plan(tmp_path / "dense", recipe, samples=4, seqlen=16)
    record = besa.compress(tmp_path / "dense", recipe, tokens, out=tmp_path / "out", tokenizer=tiny_tokenizer).record
    assert planned.dense == record.dense == {"mlp.gate": 2 * 4 * 32, "self_attn.k_proj": 2 * 16 * 32}
    assert planned.model_sparsity == record.model_sparsity == record.zeros / record.model["parameters"]
    share, dense = f"{record.model_sparsity:.2%}", "mlp.gate, self_attn.k_proj"
    for shown in (show.planned(planned), show.pruned(record, tmp_path)):
        console = Console(record=True, width=200, file=io.StringIO())
        console.print(shown)
        text = console.export_text()
        assert share in text
        assert f"1,280 weights of the blocks stay dense: {dense}" in text
    page = render([load_run(tmp_path / "out")])
    assert dense in page
    assert share.replace("%", "\N{NO-BREAK SPACE}%") in page
    old = record.model_dump(exclude={"dense", "model_sparsity"})  # of an earlier besa
    assert RunRecord.model_validate(old).model_sparsity is None
    assert "stay dense" not in show.pruned(RunRecord.model_validate(old), tmp_path).plain


def test_gguf_is_no_matter_for_plans(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(besa.BesaError, match="loaded whole"):
        besa.plan(tmp_path / "m.gguf")


def test_live_bytes_are_counted_by_hand() -> None:
    live = _LiveBytes()
    x = torch.empty(10, 100, device="meta")
    linear = nn.Linear(100, 50, device="meta")
    with torch.no_grad(), live:
        y = linear(x)  # 2,000 bytes, kept
        z = y * 2 + 1  # two more, one of them gone when the other is there
        del y
        w = z.view(500) + 1  # a view is no new memory
    assert live.peak == 6000
    assert w.nbytes == 2000
