"""Widths by block: a budget over the whole model, and folders that transformers loads only where besa is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.quantizers import auto

import besa
from besa import BesaError, Recipe, cli
from besa.models.couplings import couplings
from besa.models.finding import find_blocks
from besa.models.widths import MISSING
from besa.storage.weights import WIDTHS
from tests.calling import called
from tests.integration.test_families import TOKENS, config_of, load, random_model, saved

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
TEXT = str(TINY / "calibration.txt")
LOADING = "import sys; from transformers import AutoModelForCausalLM as A; print(A.from_pretrained(sys.argv[1]).device)"


def logits(model: PreTrainedModel, tokens_NT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens_NT, use_cache=False).logits


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama without a fifth of its weights, by the loss's sensitivity to whole channels."""
    out = tmp_path_factory.mktemp("widths") / "pruned"
    recipe = Recipe.load("wanda", 0.2, ["allocation.method=structured", "targets.method=sensitivity"])
    besa.compress(TINY, recipe, TEXT, out=out, samples=4, seqlen=32)
    return out


@pytest.fixture(scope="module")
def small(pruned: Path) -> Path:
    besa.shrink(pruned, pruned.parent / "small", by_block=True)
    return pruned.parent / "small"


def test_blocks_keep_what_the_record_says(pruned: Path, small: Path) -> None:
    record = json.loads((pruned / "besa_run.json").read_text())
    kept = [block["structures"]["ffn"][1] for block in record["blocks"]]
    assert len(set(kept)) > 2 and all(number % 8 == 0 for number in kept)
    assert abs(record["zeros"] - 0.2 * record["weights"]) <= 8 * 3 * 96 / 2  # half of eight channels
    before, after = load(pruned), load(small)
    assert type(after).__name__ == "LlamaForCausalLM" and not after.is_quantized
    for layer, number in zip(after.model.layers, kept, strict=True):
        assert layer.mlp.up_proj.weight.shape == (number, 96) and layer.mlp.up_proj.out_features == number
        assert layer.mlp.down_proj.weight.shape == (96, number) and layer.mlp.down_proj.in_features == number
        assert all(bool((parameter != 0).all()) for parameter in layer.parameters())
    tokens_NT = torch.arange(60).reshape(2, 30) * 17 % 1024
    torch.testing.assert_close(logits(after, tokens_NT), logits(before, tokens_NT), rtol=1e-4, atol=1e-4)
    assert torch.equal(
        *(each.generate(tokens_NT[:1, :5], max_new_tokens=8, do_sample=False) for each in (before, after))
    )


def test_the_command_and_the_card_say_what_is_left(pruned: Path, tmp_path: Path) -> None:
    shown = called("shrink", pruned, tmp_path / "out", "--by-block", "--quiet").stdout
    kept = [block["structures"]["ffn"][1] for block in json.loads((pruned / "besa_run.json").read_text())["blocks"]]
    left = f"between {min(kept)} and {max(kept)} feed-forward channels are left in a block"
    assert f"{left}; loading needs besa" in shown
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| sparsity of the pruned matrices before the removal | " in card
    assert "| sparsity of the pruned matrices | " not in card


def test_a_uniform_width_is_what_every_block_can_spare(pruned: Path, tmp_path: Path) -> None:
    done = besa.shrink(pruned, tmp_path / "uniform")
    kept = [block["structures"]["ffn"][1] for block in json.loads((pruned / "besa_run.json").read_text())["blocks"]]
    assert done.structures == {"ffn": (256, max(kept))} and not done.widths
    assert "quantization_config" not in json.loads((tmp_path / "uniform" / "config.json").read_text())


def test_without_besa_one_sentence_says_what_is_missing(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads((small / "config.json").read_text())["transformers_weights"] == MISSING
    for known in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(known, WIDTHS)
    for dtype in ("auto", torch.float32):
        with pytest.raises(
            FileNotFoundError, match="the blocks of this model differ in width, so loading it needs besa"
        ):
            AutoModelForCausalLM.from_pretrained(small, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["0", "1"])
def test_a_program_that_never_imports_besa(small: Path, switch: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(small)],
        env=os.environ | {"BESA_AUTOLOAD": switch},
        capture_output=True,
        text=True,
        check=False,
    )
    if switch == "1":
        assert done.returncode == 0 and done.stdout == "cpu\n", done.stderr
    else:
        assert done.returncode != 0 and MISSING in done.stderr.splitlines()[-1]


def test_it_is_a_model_as_any_other(small: Path, tmp_path: Path) -> None:
    model = load(small)
    before = logits(model, TOKENS.tokens_NT)
    model.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    assert {path.name for path in (tmp_path / "again").iterdir()} >= {"widths.safetensors", "config.json"}
    for folder in ("again", "shards"):
        assert torch.equal(logits(load(tmp_path / folder), TOKENS.tokens_NT), before)
        assert torch.equal(logits(besa.load(tmp_path / folder), TOKENS.tokens_NT), before)
    assert load(tmp_path / "shards").to(torch.bfloat16).dtype == torch.bfloat16
    model.train().requires_grad_(True)
    model(TOKENS.tokens_NT, labels=TOKENS.tokens_NT, use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert besa.verify(small).files


def test_it_can_be_trained_with_its_zeros_kept_and_with_adapters(small: Path, tmp_path: Path) -> None:
    model = load(small)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    with besa.keep_masks(model) as kept:
        assert kept.sparsity > 0
    model.add_adapter(peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapters")
    assert {path.name for path in (tmp_path / "adapters").iterdir()} >= {"adapter_model.safetensors"}
    again = load(small)
    with torch.no_grad():
        again.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    again.load_adapter(str(tmp_path / "adapters"))
    assert torch.equal(logits(again, TOKENS.tokens_NT), logits(model, TOKENS.tokens_NT))


def test_commands_know_such_folders(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for arguments in (
        ["inspect", str(small)],
        ["eval", str(small), "--ppl", TEXT, "--window", "32", "--max-windows", "2"],
    ):
        monkeypatch.setattr(sys, "argv", ["besa", *arguments])
        cli.main()
    assert "0 of" in capsys.readouterr().out
    card = (small / "README.md").read_text()
    assert "transformers loads only where besa is installed" in card and "pip install besa-llm" in card
    for refused in (
        lambda: besa.shrink(small, tmp_path / "out"),
        lambda: besa.pack(small, tmp_path / "out"),
        lambda: besa.compress(small, "wanda", TEXT, out=tmp_path / "out", samples=4, seqlen=32),
        lambda: besa.compress(
            AutoModelForCausalLM.from_pretrained(small), "wanda", TEXT, out=tmp_path / "out",
            tokenizer=AutoTokenizer.from_pretrained(small), samples=4, seqlen=32,
        ),
    ):  # fmt: skip
        with pytest.raises(BesaError, match="have widths of their own"):
            refused()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "of version 2, and this besa reads version 1"),
        ({"ffn": [8]}, "how many feed-forward channels each of its blocks has"),
        ({"ffn": [8] * 7 + [257]}, "cannot have 257 feed-forward channels"),
        ({"ffn": [8] * 7 + ["x"]}, "cannot have 'x' feed-forward channels"),
        ({"ffn": [8] * 8}, r"is \(96, 216\), its config.json says \(96, 8\)"),
    ],
)
def test_damaged_widths_are_seen(small: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    config = json.loads((small / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "widths.safetensors").write_bytes((small / "widths.safetensors").read_bytes())
    with pytest.raises(BesaError, match=words):
        besa.load(tmp_path)


@pytest.mark.parametrize(
    "family", ["opt", "gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "falcon", "qwen2"))]
)
def test_families_whose_blocks_differ(family: str, tmp_path: Path) -> None:
    """Heads too, and where the configuration could not even describe fewer of them in all blocks."""
    model = random_model(config_of(family))
    for number, block in enumerate(find_blocks(model), start=1):
        for coupling in couplings(block):
            ((name, size),) = coupling.columns.items()
            unread = number * (10 if coupling.kind == "ffn" else 1)
            block.weight(name)[:, : size * min(unread, coupling.structures)] = 0
    done = besa.shrink(saved(model, tmp_path / "dense"), tmp_path / "small", by_block=True)
    assert done.widths["ffn"][0] - done.widths["ffn"][1] == 10
    if "heads" in done.widths:
        assert done.widths["heads"][1] in (1, 2)
    torch.testing.assert_close(
        logits(load(tmp_path / "small"), TOKENS.tokens_NT), logits(model, TOKENS.tokens_NT), rtol=1e-5, atol=1e-5
    )


def test_attention_layers_that_went_keep_a_head_that_nothing_reads(tiny_tokenizer: Any, tmp_path: Path) -> None:
    dense = saved(random_model(config_of("llama", num_hidden_layers=3)), tmp_path / "dense")
    recipe = Recipe.load("depth", overrides=["allocation={method: depth, layers: attention, blocks: 2}"])
    record = besa.compress(dense, recipe, TOKENS, out=tmp_path / "pruned", tokenizer=tiny_tokenizer).record
    with pytest.raises(BesaError, match="let each block keep its own number with --by-block"):
        besa.shrink(tmp_path / "pruned", tmp_path / "small")
    done = besa.shrink(tmp_path / "pruned", tmp_path / "small", by_block=True)
    gone = [block.structures["attention"][1] == 0 for block in record.blocks]
    assert sum(gone) == 2 and done.widths == {"heads": [1 if each else 2 for each in gone]}
    before, after = load(tmp_path / "pruned"), load(tmp_path / "small")
    tokens_NT = TOKENS.tokens_NT
    torch.testing.assert_close(logits(after, tokens_NT), logits(before, tokens_NT), rtol=1e-4, atol=1e-4)


def test_norms_over_all_heads_do_not_fit_fewer(tmp_path: Path) -> None:
    model = random_model(config_of("olmo2"))
    for name, parameter in model.model.layers[1].self_attn.named_parameters():
        if "proj" in name:
            parameter.zero_()
    with pytest.raises(BesaError, match="computes something else with smaller matrices"):
        besa.shrink(saved(model, tmp_path / "dense"), tmp_path / "small", by_block=True)
    assert not (tmp_path / "small").exists()


def test_one_width_for_all_needs_nobody(tmp_path: Path) -> None:
    model = random_model(config_of("llama"))
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, 3:11] = 0
    done = besa.shrink(saved(model, tmp_path / "dense"), tmp_path / "small", by_block=True)
    assert done.structures == {"ffn": (96, 88)} and (tmp_path / "small" / "model.safetensors").exists()
