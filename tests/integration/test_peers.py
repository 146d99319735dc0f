"""What besa is measured beside: the same model for other programs, and what is made of the figures."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import besa
from benchmarks.peers import gguf_files, llamacpp
from benchmarks.peers.quality import plot, table
from benchmarks.random_model import quantized, write
from besa.storage.weights import WeightFiles

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
TOKENS = torch.arange(24).view(1, -1)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(TOKENS).logits


def test_a_gguf_file_is_the_same_model(tmp_path: Path) -> None:
    model = besa.load(TINY, dtype="bfloat16")
    model.save_pretrained(tmp_path / "dense")
    gguf_files.write(tmp_path / "dense", tmp_path / "model.gguf", None)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    torch.testing.assert_close(logits(found), logits(model.float()), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32)])
def test_random_weights_in_codes_keep_their_zeros(bits: int, group: int | None, tmp_path: Path) -> None:
    settings = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    write(tmp_path / "dense", settings, sparsity=0.5)
    quantized(tmp_path / "dense", tmp_path / "codes", bits, group)
    dense, coded = (
        dict(files.read(files.names)) for files in map(WeightFiles, (tmp_path / "dense", tmp_path / "codes"))
    )
    assert torch.equal(coded["lm_head.weight"], dense["lm_head.weight"])
    packed = llamacpp._packed(tmp_path, "codes", tmp_path / "codes", None)
    assert packed.file_bytes < sum(tensor.nbytes for tensor in dense.values())
    model = besa.load(tmp_path / "packed-codes", dtype="bfloat16")
    for name, linear in model.named_modules():
        if name.endswith("_proj"):
            before = dense[f"{name}.weight"]
            assert torch.equal(linear.weight == 0, before == 0) or bits == 4
            assert bool((linear.weight[before == 0] == 0).all())
            width = before.float().amax() - before.float().amin()
            assert (linear.weight.float() - before.float()).abs().max() < 0.6 * width / (2**bits - 1) + 0.01 * width
    assert packed.decode(2) > 0
    assert packed.prompt() > 0


def test_perplexity_is_of_the_second_half_of_each_window() -> None:
    model = besa.load(TINY)
    tokens_WT = torch.arange(64).view(2, 32)
    with torch.no_grad():
        losses = -model(tokens_WT).logits.log_softmax(-1)[:, :-1].gather(2, tokens_WT[:, 1:, None])
    found = llamacpp.Windows(Path(), tokens_WT).perplexity(model)
    assert found == pytest.approx(float(losses[:, 16:].mean().exp()), rel=1e-4)


def test_table_and_plot_hold_every_model() -> None:
    paces = {"decode": {"middle": 12.34, "all": []}, "prompt": {"middle": 1234.5, "all": []}}
    found = [
        {"maker": maker, "form": form, "file_bytes": size, "perplexity": 20.0 + size / 1e9, **paces}
        for maker, form, size in [("llama.cpp", "Q8_0", 1e8), ("besa", "best-int4", 6e7), ("besa", "dense", 2e8)]
    ]
    assert table(found).splitlines()[2:] == [
        "| dense | besa | 200.0 | 20.20 | 12.3 | 1,234.5 |",
        "| Q8_0 | llama.cpp | 100.0 | 20.10 | 12.3 | 1,234.5 |",
        "| best-int4 | besa | 60.0 | 20.06 | 12.3 | 1,234.5 |",
    ]
    drawn = plot(found)
    ElementTree.fromstring(drawn)
    assert all(drawn.count(f"{one['maker']}, {one['form']}") == 2 for one in found)
