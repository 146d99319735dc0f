"""From disk to disk: what is written, and that where weights and hidden states live decides nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import besa
from besa.checkpoint import writer
from besa.report import load_run, render
from tests.slowly import some_slow

FEW = ["allocation.steps=12"]


@pytest.fixture
def settings(shallow_llama_folder: Path) -> dict[str, object]:
    return {"calibration": str(shallow_llama_folder / "calibration.txt"), "samples": 12, "seqlen": 32, "sparsity": 0.5}


def same(left: Path, right: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (left, right))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("teacher", some_slow(["dense", "pruned"], {"dense"}))
def test_hidden_states_on_disk_change_nothing(shallow_llama_folder, settings, tmp_path, teacher):
    recipe = besa.Recipe.load("besa", overrides=[f"allocation.teacher={teacher}", *FEW])
    for name, budget in (("memory", None), ("disk", 0)):
        besa.compress(shallow_llama_folder, recipe, out=tmp_path / name, activation_budget=budget, **settings)
    assert same(tmp_path / "memory", tmp_path / "disk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "memory"]


def test_from_disk_as_from_memory(shallow_llama, tiny_tokenizer, shallow_llama_folder, settings, tmp_path):
    recipe = besa.Recipe.load("besa", overrides=FEW)
    besa.compress(shallow_llama_folder, recipe, out=tmp_path / "disk", **settings)
    besa.compress(shallow_llama, recipe, out=tmp_path / "memory", tokenizer=tiny_tokenizer, **settings)
    assert same(tmp_path / "disk", tmp_path / "memory")
    assert torch.equal(
        shallow_llama.model.layers[2].mlp.up_proj.weight,
        load_file(tmp_path / "disk" / "model.safetensors")["model.layers.2.mlp.up_proj.weight"],
    )


def test_large_checkpoints_are_sharded_by_block(shallow_llama_folder, settings, tmp_path, monkeypatch):
    besa.compress(shallow_llama_folder, "wanda", out=tmp_path / "one", **settings)
    monkeypatch.setattr(writer, "ONE_FILE", 0)
    besa.compress(shallow_llama_folder, "wanda", out=tmp_path / "many", **settings)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert len(set(index["weight_map"].values())) == 4  # three blocks and the rest
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "many" / file, framework="pt") as shard:
            assert torch.equal(shard.get_tensor(name), whole[name])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "many").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.items())
    again = besa.compress(tmp_path / "many", "wanda", out=tmp_path / "again", **settings)  # shards are read as well
    assert again.record.zeros == round(0.5 * again.record.weights)
    assert not (tmp_path / "many.partial").exists()


def test_names_in_the_files_stay_as_they_were(shallow_llama_folder, settings, tmp_path):
    """GPT-2's own files leave out the name of the inner model."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=1024, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    )
    folder = tmp_path / "gpt2"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(shallow_llama_folder).save_pretrained(folder)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)  # a mask that older releases kept: passed through
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    besa.compress(folder, "wanda", out=tmp_path / "out", **settings)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all((found[f"transformer.h.{i}.mlp.c_fc.weight"] == 0).double().mean() == 0.5 for i in range(2))


def test_sampling_settings_come_along(shallow_llama_folder, settings, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(shallow_llama_folder, folder)
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.25, "eos_token_id": [0, 7]}')
    besa.compress(folder, "wanda", out=tmp_path / "out", **settings)
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (found["do_sample"], found["temperature"], found["eos_token_id"]) == (True, 0.25, [0, 7])


def test_a_block_that_is_skipped_whole_stays_as_it_is(shallow_llama_folder, shallow_llama, settings, tmp_path):
    recipe = besa.Recipe.load("besa", overrides=FEW).with_exceptions(["model.layers.1.*"], [])
    record = besa.compress(shallow_llama_folder, recipe, out=tmp_path / "out", **settings).record
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in shallow_llama.model.layers[1].state_dict().items():
        assert torch.equal(found[f"model.layers.1.{name}"], tensor)
    assert (record.blocks[1].weights, record.blocks[1].zeros, record.sparsity) == (0, 0, 0.5)
    assert "<html" in render([load_run(tmp_path / "out")])


def test_dtype_of_the_result_is_the_one_asked_for(shallow_llama_folder, settings, tmp_path):
    besa.compress(shallow_llama_folder, "wanda", out=tmp_path / "out", dtype="bfloat16", **settings)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_skipped_linears_stay_dense_and_others_get_what_was_asked(
    shallow_llama_folder, shallow_llama, settings, tmp_path
):
    recipe = besa.Recipe.load("besa", overrides=FEW).with_exceptions(["*.k_proj"], ["model.layers.0.*=0.25"])
    record = besa.compress(shallow_llama_folder, recipe, out=tmp_path / "out", **settings).record
    found = load_file(tmp_path / "out" / "model.safetensors")
    zeros = {name: int((tensor == 0).sum()) for name, tensor in found.items() if name.endswith("_proj.weight")}
    sizes = {name: found[name].numel() for name in zeros}
    for name, tensor in shallow_llama.state_dict().items():
        if name.endswith("k_proj.weight"):
            assert torch.equal(found[name], tensor)
        elif name.startswith("model.layers.0.") and name in zeros:
            assert zeros[name] == round(0.25 * sizes[name])
    others = [name for name in zeros if "k_proj" not in name and "layers.0." not in name]
    assert sum(zeros[name] for name in others) == round(0.5 * sum(sizes[name] for name in others))
    assert record.weights == sum(size for name, size in sizes.items() if "k_proj" not in name)
    assert record.zeros == sum(zeros.values())
