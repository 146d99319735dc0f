"""What besa is measured beside: the same model for other programs, and what is made of the figures."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import besa
from benchmarks.peers import gguf_files, llamacpp, measuring, own, rows
from benchmarks.peers.exactness import exactness
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


def test_a_run_is_measured_and_writes_what_the_recipe_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    besa.load(TINY, dtype="bfloat16").save_pretrained(tmp_path / "dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "dense" / name).write_bytes((TINY / name).read_bytes())
    tokens_NT = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens_NT}, tmp_path / "tokens")
    job = measuring.Job(
        str(tmp_path / "dense"), str(tmp_path / "tokens"), str(tmp_path / "out"), 2, "wanda", ["allocation.method=nm"]
    )
    (tmp_path / "job.json").write_text(json.dumps(asdict(job)))
    monkeypatch.setattr(sys, "argv", ["own", str(tmp_path / "job.json")])
    measuring.run(own.prune, ("torch",))
    done = json.loads((tmp_path / "job.done").read_text())
    assert done["versions"] == {"torch": torch.__version__}
    assert done["passes"] == done["seconds"]["whole"]["processor"] / done["seconds"]["forward"]["processor"] > 1
    assert done["peak_memory_bytes"] > 100e6  # torch alone is more
    recipe = besa.Recipe.load("wanda", 0.5, ["allocation.method=nm"])
    same = besa.compress(tmp_path / "dense", recipe, besa.Calibration(tokens_NT, "tokens", 0), batch=2, device="cpu")
    found = besa.load(tmp_path / "out", device="cpu")
    for name, weight in same.model.state_dict().items():
        assert torch.equal(found.state_dict()[name], weight)
    exact = exactness(found, 0.5, 4)
    assert exact["zeros"] == exact["weights"] // 2
    assert (exact["excess"], exact["uneven"], exact["broken_groups"]) == (0, 0, 0)


def test_exactness_counts_what_is_too_many_and_what_breaks_a_pattern() -> None:
    model = besa.load(TINY)
    linears = [module for name, module in model.named_modules() if name.endswith("_proj")]
    weights = sum(linear.weight.numel() for linear in linears)
    with torch.no_grad():
        for linear in linears:
            linear.weight.copy_(
                torch.tensor([0.0, 1.0, 1.0, 0.0]).repeat(len(linear.weight), linear.weight.shape[1] // 4)
            )
        linears[0].weight[0, :2] = torch.tensor([1.0, 0.0])  # another place, as many
        linears[1].weight[0, :8] = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0])  # one too many
        linears[2].weight[0, 1] = 0
        linears[2].weight[0, 4] = 1  # as many, in two broken groups
    found = exactness(model, 0.5, 4)
    count = linears[1].weight.numel()
    assert found == {
        "weights": weights,
        "zeros": weights // 2 + 1,
        "excess": 1,
        "lowest": 0.5,
        "highest": (count // 2 + 1) / count,
        "linears": len(linears),
        "uneven": 1,
        "broken_groups": 3,
    }
    assert "broken_groups" not in exactness(model, 0.5, None)


def test_rows_are_kept_under_the_same_conditions_only(tmp_path: Path) -> None:
    about = {"maker": "besa", "method": "wanda", "pattern": "2:4", "calibration": "c4"}
    zeros = {"weights": 200, "zeros": 101, "excess": 1, "lowest": 0.5, "highest": 0.51}
    row = {
        "perplexity": {"domains": 20.123, "wikitext2": 3.0},
        "passes": 2.005,
        "peak_memory_bytes": 1.5e9,
        "zeros": zeros,
    }
    dense = {"maker": "besa", "method": "dense", "pattern": "", "calibration": "", "perplexity": row["perplexity"]}
    first = rows.Rows(tmp_path / "peers", {"model": "one"})
    first.add(about | row)
    first.add(dense)
    again = rows.Rows(tmp_path / "peers", {"model": "one"})
    assert again.holds(about)
    assert not again.holds(about | {"calibration": "mix"})
    assert not rows.Rows(tmp_path / "peers", {"model": "two"}).found
    assert (tmp_path / "peers.md").read_text().splitlines()[2:] == [
        "| besa | dense |  |  | 20.12 | 3.00 |  |  |  |  |  |",
        "| besa | wanda | 2:4 | c4 | 20.12 | 3.00 | 50.5000 | 1 | 50.00 to 51.00 | 2.00 | 1.50 |",
    ]
