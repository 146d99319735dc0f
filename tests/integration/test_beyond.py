"""The recipes past BESA on the tiny Llama: exact, resumable, of any parts, and better for what they cost."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

import besa
from besa.data.calibration import Calibration
from besa.methods.recipe import Recipe
from besa.models.streaming import DecoderInMemory
from besa.pruning import prune_blocks
from tests.slowly import some_slow

SIZES = {"samples": 16, "seqlen": 64}
QUICK = ["distill.epochs=2"]


def pruned(folder: Path, recipe: Recipe, out: Path, **options):
    text = str(folder / "calibration.txt")
    return besa.compress(folder, recipe, text, out=out, **(SIZES | options))


@pytest.mark.slow
def test_each_step_lowers_the_perplexity(tiny_llama_folder, tmp_path):
    recipes = {name: Recipe.load(name, 0.6, QUICK if name == "best" else ()) for name in ("wanda", "fast", "best")}
    found = {}
    for name, recipe in recipes.items():
        result = pruned(tiny_llama_folder, recipe, tmp_path / name)
        assert result.record.zeros == round(0.6 * result.record.weights)
        evaluation = besa.evaluate(tmp_path / name, [str(tiny_llama_folder / "heldout.txt")], window=64, max_windows=40)
        found[name] = evaluation.perplexity["heldout"]
    assert found["best"] < found["fast"] < 0.95 * found["wanda"]


@pytest.mark.slow
def test_best_goes_on_after_an_interruption_to_the_same(tiny_llama_folder, tmp_path):
    recipe = Recipe.load("best", None, ["finetune={method: adam, epochs: 1}", "distill.epochs=1"])
    sizes = {"samples": 8, "seqlen": 32}

    def stop(done, blocks, state):
        if done == 3:
            raise KeyboardInterrupt

    whole = pruned(tiny_llama_folder, recipe, tmp_path / "whole", **sizes).record
    with pytest.raises(besa.errors.Interrupted):
        pruned(tiny_llama_folder, recipe, tmp_path / "parts", progress=stop, **sizes)
    resumed = pruned(tiny_llama_folder, recipe, tmp_path / "parts", resume=True, **sizes).record
    assert resumed.restored_blocks == 3
    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "parts")]
    assert files[0] == files[1]
    for block in whole.blocks:
        assert len(block.finetuning) == 2


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(
            ["reconstruction.method=cg", "allocation={method: besa, teacher: pruned, steps: 4}"], marks=pytest.mark.slow
        ),
        ["reconstruction.method=admm", "importance.method=obs", "finetune.loss=channel"],
    ],
    ids=["besa", "admm"],
)
@pytest.mark.parametrize("dtype", some_slow(["float32", "bfloat16"], {"bfloat16"}))
def test_parts_go_together(dtype, overrides, tiny_llama_folder, tmp_path):
    recipe = Recipe.load("best", 0.55, ["finetune={method: adam, epochs: 1}", "distill.epochs=1", *overrides])
    record = pruned(tiny_llama_folder, recipe, tmp_path / "out", samples=4, seqlen=32, dtype=dtype).record
    assert record.zeros == round(0.55 * record.weights)
    assert all(block.reconstruction_error < 1 for block in record.blocks)


def test_mixtures_of_experts():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    calibration = Calibration(torch.randint(0, 64, (8, 16)), "random", 0)
    recipe = Recipe.load("best", 0.5, ["finetune={method: adam, epochs: 1}", "distill.epochs=1"])
    records = prune_blocks(DecoderInMemory(model), recipe, calibration).records
    assert sum(block.zeros for block in records) == round(0.5 * sum(block.weights for block in records))
