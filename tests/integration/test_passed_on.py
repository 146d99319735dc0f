"""What a checkpoint has besides pruned weights comes out as it went in: files to the byte, tensors to the bit."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import besa
from besa.checkpoint.inspection import inspect
from besa.checkpoint.packing import pack, unpack
from besa.checkpoint.shrinking import shrink
from besa.errors import BesaError, Notice
from besa.models.source import locate
from besa.storage.companion_names import is_read
from tests.slowly import some_slow

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
WEIGHTS = "model.safetensors"
SMALL = {"calibration": str(TINY / "calibration.txt"), "samples": 4, "seqlen": 32}
TEXT: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def saved(model: transformers.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    return folder


def llama(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT | {"tie_word_embeddings": False} | changes)
    return saved(transformers.LlamaForCausalLM(config).to(dtype), folder)


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def configure(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(bits(left), bits(right))


def assert_only_pruned(before: Path, after: Path) -> int:
    """Every tensor is there and as it was, but for zeros in what was pruned; returns how many tensors have new ones."""
    old, new = load_file(before / WEIGHTS), load_file(after / WEIGHTS)
    assert new.keys() == old.keys()
    pruned = 0
    for name, tensor in old.items():
        if not same_bits(tensor, new[name]):
            pruned += 1
            gone = new[name] == 0  # a negative zero becomes one without a sign
            assert new[name].dtype == tensor.dtype, name
            assert torch.equal(bits(tensor.masked_fill(gone, 0)), bits(new[name].masked_fill(gone, 0))), name
    return pruned


def older_llama(folder: Path) -> Path:
    """A folder as the Hub has them since Llama 3, with all that stands beside the weights."""
    llama(folder, torch.bfloat16, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    older = {"rope_theta": 500000.0, "rope_scaling": None, "torch_dtype": "bfloat16", "transformers_version": "4.46.0"}
    configure(folder, ("rope_parameters", "dtype"), **older, temperature=0.7, max_length=200, do_sample=True)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer.pop("backend", None)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(tokenizer | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    generation = {"_from_model_config": True, "bos_token_id": 0, "temperature": 0.9, "top_p": 0.6, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation))  # transformers reads this, and saves it not
    texts = {
        "LICENSE": "Some community licence",
        "USE_POLICY.md": "be kind",
        "Notice.txt": "built with",
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "preprocessor_config.json": "{}",
        "special_tokens_map.json": "{}",
        "vocab.txt": "a\nb\n",
        "bpe.codes": "a b\n",
        "merges.tiktoken": "YQ== 0\n",
    }
    (folder / "additional_chat_templates").mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name in ("tokenizer.model", "tokenizer.model.v3"):
        (folder / name).write_bytes(b"\x00\x01 a sentencepiece model")
    return folder


def with_other_weights(folder: Path) -> set[str]:
    """Add weights in other formats and places; returns their names."""
    others = {"pytorch_model.bin", "consolidated.00.pth", "model.onnx", "tf_model.h5", "original/consolidated.json"}
    others |= {"model.safetensors.index.json", "model-00001-of-00002.safetensors", "adapter_model.safetensors"}
    (folder / "original").mkdir()
    for name in others:
        (folder / name).write_bytes(b"not what you think")
    return others


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_at_zero_sparsity_a_folder_comes_out_as_it_went_in(tmp_path: Path) -> None:
    source = older_llama(tmp_path / "model")
    others = with_other_weights(source)
    besa.compress(source, "wanda", out=tmp_path / "out", sparsity=0, **SMALL)
    before, after = files(source), files(tmp_path / "out")
    assert after.keys() == before.keys() - others | {"besa_run.json", "README.md"}
    assert [name for name in before.keys() & after.keys() if before[name] != after[name]] in (
        ["config.json"],
        ["config.json", WEIGHTS],
        [WEIGHTS, "config.json"],
    )
    config = json.loads(after["config.json"])
    own = config.pop("besa")
    assert list(config.items()) == list(json.loads(before["config.json"]).items())  # the order too
    assert own["sparsity"] == 0
    assert assert_only_pruned(source, tmp_path / "out") == 0


def test_files_come_along_to_every_folder_that_is_made_of_another(tmp_path: Path) -> None:
    source = older_llama(tmp_path / "model")
    besa.compress(source, "wanda", out=tmp_path / "out", sparsity=0.5, **SMALL)
    pack(tmp_path / "out", tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    before = files(source)
    for name in ("out", "packed", "unpacked"):
        after = files(tmp_path / name)
        assert all(after[file] == content for file, content in before.items() if file not in ("config.json", WEIGHTS))
    assert assert_only_pruned(source, tmp_path / "unpacked") == 14


def test_what_a_user_keeps_beside_a_model_stays_there(tmp_path: Path) -> None:
    source = llama(tmp_path / "model")
    mine = {"calibration.txt", "notes.txt", "results.json", "plot.py", "todo.md"}
    for name in mine:
        (source / name).write_text("mine")
    before = files(source).keys()
    besa.compress(source, "wanda", out=tmp_path / "out", **SMALL)
    assert files(tmp_path / "out").keys() == before - mine | {"besa_run.json", "README.md"}
    (tmp_path / "out" / "notes.txt").write_text("mine")
    pack(tmp_path / "out", tmp_path / "packed")
    assert not (tmp_path / "packed" / "notes.txt").exists()


def test_what_code_of_its_own_consists_of_and_reads_comes_along(tmp_path: Path) -> None:
    source = with_own_code(tmp_path / "coded")
    texts = {
        "tokenization_tiny.py": "from .vocabulary import NAMES\nfrom .nowhere import x\n",
        "vocabulary.py": "NAMES = ['words.txt', \"pieces.json\"]\n",
        "pipeline_tiny.py": "x = 1\n",
        "unused.py": "OTHER = 'other.json'\n",
        "words.txt": "a\n",
        "pieces.json": "{}",
        "ranks.txt": "a\n",
        "other.json": "{}",
        "ords.txt": "a\n",
    }
    for name, text in texts.items():
        (source / name).write_text(text)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["extra_files"] = ["ranks.txt"]
    settings["auto_map"] = {"AutoImageProcessor": ["tokenization_tiny.Tiny", None], "AutoX": "a/b--unused.Tiny"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    configure(source, custom_pipelines={"tiny": {"impl": "pipeline_tiny.Tiny", "pt": ["AutoModel"]}})
    before, left = files(source).keys(), {"unused.py", "other.json", "ords.txt"}
    with pytest.warns(Notice, match=r"^ords\.txt, other\.json, unused\.py of .* were not copied, as neither"):
        besa.compress(source, "wanda", out=tmp_path / "out", trust_remote_code=True, **SMALL)
    assert files(tmp_path / "out").keys() == before - left | {"besa_run.json", "README.md"}


def test_no_vocabulary_that_a_tokenizer_of_transformers_reads_stays_behind() -> None:
    """The classes themselves may need packages that are not there, so their files are read."""
    folder = Path(transformers.__file__).parent / "models"
    texts = [path.read_text(encoding="utf-8") for path in folder.glob("*/tokenization_*.py")]
    entries = [entry for text in texts for entry in re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", text, re.DOTALL)]
    names = {name for entry in entries for name in re.findall(r":\s*\"([^\"]+)\"", entry)}
    assert len(names) > 20
    assert {name for name in names if not is_read(name)} == set()


def test_whatever_a_configuration_says_comes_out_again(tmp_path: Path) -> None:
    source = llama(tmp_path / "model")
    odd = {
        "limit": float("inf"),
        "note": "日本語 ü",
        "half": "\ud800",
        "inner": {"none": None, "list": [1, {"a": 1e-45}]},
    }
    configure(source, **odd, large=2**70)
    besa.compress(source, "wanda", out=tmp_path / "out", sparsity=0, **SMALL)
    text = (tmp_path / "out" / "config.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert found.pop("besa") and found == json.loads((source / "config.json").read_text())
    assert "日本語" in text  # as a person wrote it


def test_weights_under_a_name_of_their_own_are_refused(tmp_path: Path) -> None:
    """transformers would load them, and not the model.safetensors beside them."""
    source = llama(tmp_path / "model")
    (source / "other.safetensors").write_bytes((source / WEIGHTS).read_bytes())
    configure(source, transformers_weights="other.safetensors")
    for call in (besa.plan, besa.load, lambda model: besa.compress(model, "wanda", out=tmp_path / "out", **SMALL)):
        with pytest.raises(BesaError, match=r"names other.safetensors as the weight file .*rename that file"):
            call(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_of_shards_all_that_is_in_them_counts(tmp_path: Path) -> None:
    """An index that forgets tensors, or has them in the wrong file, is read as transformers reads it."""
    source = llama(tmp_path / "whole")
    shutil.copytree(source, tmp_path / "shards")
    tensors = load_file(source / WEIGHTS)
    names = sorted(tensors)
    halves = {f"model-0000{number}-of-00002.safetensors": names[number - 1 :: 2] for number in (1, 2)}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, tmp_path / "shards" / file, {"format": "pt"})
    (tmp_path / "shards" / WEIGHTS).unlink()
    first, second = halves
    places = {
        names[0]: second,
        names[1]: second,
        names[2]: first,
    }  # the first one's place is wrong, the rest is missing
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shards").state_dict()
    assert all(same_bits(tensor, loaded[name]) for name, tensor in tensors.items())
    for case in ("whole", "shards"):
        besa.compress(tmp_path / case, "wanda", out=tmp_path / f"{case}-out", **SMALL)
    found, expected = load_file(tmp_path / "shards-out" / WEIGHTS), load_file(tmp_path / "whole-out" / WEIGHTS)
    assert found.keys() == expected.keys() and all(same_bits(found[name], own) for name, own in expected.items())


def test_sampling_settings_that_cannot_be_saved_do_not_stop_a_run(tmp_path: Path, tiny_tokenizer) -> None:
    """Also of a model in memory, which has no files."""
    settings = '{"temperature": 0.9, "top_p": 0.6, "do_sample": false}'
    (llama(tmp_path / "model") / "generation_config.json").write_text(settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    config = model.config.to_dict()
    besa.compress(model, "wanda", out=tmp_path / "out", tokenizer=tiny_tokenizer, **SMALL)
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (found["temperature"], found["top_p"]) == (0.9, 0.6)
    assert model.config.to_dict() == config
    assert json.loads((tmp_path / "out" / "config.json").read_text())["besa"]["sparsity"] == 0.5


@pytest.mark.parametrize("recipe", ["wanda", "sparsegpt"])
def test_tensors_keep_the_dtype_they_are_stored_in(tmp_path: Path, recipe: str) -> None:
    """Norms, a head and one linear in float32 among bfloat16."""
    source = llama(tmp_path / "model", torch.bfloat16)

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        wide = [name for name in tensors if "norm" in name or name == "lm_head.weight"]
        for name in [*wide, "model.layers.1.mlp.up_proj.weight"]:
            noise = torch.rand(tensors[name].shape, generator=torch.Generator().manual_seed(1)) * 1e-4
            tensors[name] = tensors[name].float() + noise
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = -0.0

    change(source, mix)
    besa.compress(source, recipe, out=tmp_path / "out", sparsity=0.5, **SMALL)
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in before.items()}
    assert all(same_bits(before[name], after[name]) for name in before if "_proj" not in name)
    linears = [tensor for name, tensor in after.items() if "_proj" in name]
    assert 2 * sum(int((tensor == 0).sum()) for tensor in linears) == sum(tensor.numel() for tensor in linears)
    if recipe == "wanda":  # whose kept weights do not move
        assert assert_only_pruned(source, tmp_path / "out") == 14


def test_experts_that_are_stored_apart_keep_their_dtypes(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2})
    torch.manual_seed(0)
    source = saved(transformers.MixtralForCausalLM(config).to(torch.bfloat16), tmp_path / "model")
    names = [name for name in load_file(source / WEIGHTS) if "experts.2." in name or "gate.weight" in name]
    assert len(names) == 8

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {name: tensors[name].float() * 1.0001 for name in names}

    change(source, widen)
    besa.compress(source, "wanda", out=tmp_path / "out", sparsity=0.5, **SMALL)
    assert assert_only_pruned(source, tmp_path / "out") == 2 * (4 + 3 * 4)


def test_another_dtype_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    source = older_llama(tmp_path / "model")
    change(source, lambda tensors: tensors.update({"model.layers.7.extra": torch.ones(3)}))
    configure(source, num_nextn_predict_layers=1)
    besa.compress(source, "wanda", out=tmp_path / "out", dtype="float32", **SMALL)
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["torch_dtype"], "dtype" in config) == ("float32", False)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
def test_numbers_too_large_for_the_dtype_asked_for_are_refused(tmp_path: Path, name: str) -> None:
    source = llama(tmp_path / "model")
    change(source, lambda tensors: tensors[name][3].mul_(1e9))
    with pytest.raises(BesaError, match=rf"{name} holds numbers too large for float16"):
        besa.compress(source, "wanda", out=tmp_path / "out", dtype="float16", **SMALL)


def with_further_layer(folder: Path) -> Path:
    """GLM-4.5 keeps the layer that predicts a further token behind its blocks."""
    config = transformers.Glm4MoeConfig(
        **TEXT
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
        | {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 1}
    )
    torch.manual_seed(0)
    saved(transformers.Glm4MoeForCausalLM(config), folder)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        last = {name: tensor for name, tensor in tensors.items() if ".layers.1." in name}
        tensors |= {name.replace(".layers.1.", ".layers.2."): tensor.clone() for name, tensor in last.items()}
        tensors["model.layers.2.eh_proj.weight"] = torch.randn(64, 128).to(torch.float8_e4m3fn)

    change(folder, add)
    return folder


def test_layers_that_transformers_does_not_build_are_passed_through_and_counted(tmp_path: Path) -> None:
    source = with_further_layer(tmp_path / "model")
    record = besa.compress(source, "wanda", out=tmp_path / "out", **SMALL).record
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    further = [name for name in before if ".layers.2." in name]
    assert after.keys() == before.keys()
    assert all(same_bits(before[name], after[name]) for name in further)
    assert record.passed_through.tensors == len(further)
    assert record.passed_through.bytes == sum(before[name].nbytes for name in further)
    assert set(record.passed_through.names) <= set(further)
    pack(tmp_path / "out", tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    again = load_file(tmp_path / "unpacked" / WEIGHTS)
    assert all(same_bits(before[name], again[name]) for name in further)


def test_more_blocks_than_the_configuration_says_are_refused(tmp_path: Path) -> None:
    source = with_further_layer(tmp_path / "model")
    configure(source, num_nextn_predict_layers=0)
    with pytest.raises(BesaError, match=r"holds 3 blocks, its config.json says 2"):
        besa.compress(source, "wanda", out=tmp_path / "out", **SMALL)
    configure(source, num_nextn_predict_layers=1, num_hidden_layers=1)
    with pytest.raises(BesaError, match=r"holds 3 blocks, its config.json says 1"):
        besa.compress(source, "wanda", out=tmp_path / "out", **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_what_is_not_built_is_packed_as_it_is(tmp_path: Path) -> None:
    """Masks hold infinity, and no dtype that is asked for is theirs."""
    further = {
        "model.layers.0.self_attn.mask": torch.full((4, 4), -torch.inf).triu(1),
        "vision.scale_inv": torch.ones(3, dtype=torch.float8_e4m3fn),
        "vision.index": torch.arange(3),
        "vision.scalar": torch.tensor(3.1),
    }
    source = llama(tmp_path / "model", torch.bfloat16)
    change(source, lambda tensors: tensors.update(further))
    besa.compress(source, "wanda", out=tmp_path / "out", **SMALL)
    for dtype in ("auto", "float16"):
        pack(tmp_path / "out", tmp_path / f"packed-{dtype}", dtype=dtype)
        besa.verify(tmp_path / f"packed-{dtype}")
        unpack(tmp_path / f"packed-{dtype}", tmp_path / f"unpacked-{dtype}")
        found = load_file(tmp_path / f"unpacked-{dtype}" / WEIGHTS)
        assert all(torch.equal(found[name], tensor) for name, tensor in further.items() if tensor.itemsize > 1)
        assert {name: found[name].dtype for name in further} == {name: own.dtype for name, own in further.items()}
        assert found["model.norm.weight"].dtype == {"auto": torch.bfloat16, "float16": torch.float16}[dtype]


@pytest.mark.parametrize("case", ["either name", "not tied"])
def test_packed_checkpoints_tie_what_dense_ones_tie(tmp_path: Path, case: str) -> None:
    source = llama(tmp_path / "model", tie_word_embeddings=True)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        embeddings = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = 2 * embeddings if case == "not tied" else tensors.pop("model.embed_tokens.weight")

    change(source, rename)
    besa.compress(source, "wanda", out=tmp_path / "out", **SMALL)
    pack(tmp_path / "out", tmp_path / "packed")
    x = torch.arange(3, 20)[None]
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(x).logits
    torch.testing.assert_close(besa.load(tmp_path / "packed")(x).logits, expected, atol=1e-5, rtol=1e-5)


def test_tied_weights_may_stand_under_either_name(tmp_path: Path) -> None:
    name, other = "model.embed_tokens.weight", "lm_head.weight"
    source = llama(tmp_path / "one", tie_word_embeddings=True)
    shutil.copytree(source, tmp_path / "two")
    change(tmp_path / "two", lambda tensors: tensors.update({other: tensors.pop(name)}))
    shutil.copytree(source, tmp_path / "both")
    change(tmp_path / "both", lambda tensors: tensors.update({other: tensors[name].clone()}))
    for case in ("one", "two", "both"):
        besa.compress(tmp_path / case, "fast", out=tmp_path / f"{case}-out", **SMALL)  # looks at the loss, so the head
    found = {case: load_file(tmp_path / f"{case}-out" / WEIGHTS) for case in ("one", "two", "both")}
    assert same_bits(found["one"][name], found["two"].pop(other))
    assert same_bits(found["one"].pop(name), found["both"].pop(name)) and found["both"].pop(other) is not None
    assert found["one"].keys() == found["two"].keys() == found["both"].keys()
    for case in ("two", "both"):
        assert all(same_bits(tensor, found[case][key]) for key, tensor in found["one"].items())


def test_heads_that_differ_from_embeddings_are_not_tied(tmp_path: Path) -> None:
    """Whatever config.json says of it: so transformers loads them."""
    source = llama(tmp_path / "model", tie_word_embeddings=True)
    change(source, lambda tensors: tensors.update({"lm_head.weight": torch.randn(1024, 64) * 0.02}))
    besa.compress(source, "fast", out=tmp_path / "out", **SMALL)
    tied, loaded = tmp_path / "tied", AutoModelForCausalLM.from_pretrained(source)
    loaded.config.tie_word_embeddings = False
    saved(loaded, tied)
    besa.compress(tied, "fast", out=tmp_path / "tied-out", **SMALL)
    found, expected = load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "tied-out" / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(same_bits(tensor, found[name]) for name, tensor in expected.items())


def test_a_float8_weight_is_refused_before_the_work(tmp_path: Path) -> None:
    source = llama(tmp_path / "model", torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    change(source, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(BesaError, match=rf"stores {name} as F8_E4M3"):
        besa.compress(source, "wanda", out=tmp_path / "out", **SMALL)


@pytest.mark.parametrize("part", ["whole", "text_config"])
def test_codes_of_any_format_are_refused_as_such(tmp_path: Path, part: str) -> None:
    """Not as an incomplete checkpoint; wrappers may say it of their text decoder."""
    source = llama(tmp_path / "model") if part == "whole" else wrapper("qwen2_5_vl", tmp_path / "model")[1]
    own = {"quant_method": "mxfp4"}
    config = json.loads((source / "config.json").read_text())
    configure(
        source,
        **({"quantization_config": own} if part == "whole" else {part: config[part] | {"quantization_config": own}}),
    )
    change(source, lambda tensors: [tensors.pop(name) for name in list(tensors) if "up_proj" in name])
    for call in (besa.plan, lambda model: besa.compress(model, "wanda", out=tmp_path / "out", **SMALL)):
        with pytest.raises(BesaError, match="is quantised: prune the model it was made from"):
            call(source)
    for call in (besa.load, lambda model: pack(model, tmp_path / "out")):
        with pytest.raises(BesaError, match="is quantised in a format that besa does not read"):
            call(source)


def wrapper(kind: str, folder: Path) -> tuple[type[transformers.PreTrainedModel], Path]:
    """A small model with a vision tower, as its own class saves it."""
    text = TEXT | {"num_hidden_layers": 4}
    vision = {"hidden_size": 32, "intermediate_size": 64, "patch_size": 8}
    if kind == "qwen3_5":
        linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
        linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
        vision |= {"depth": 2, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16}
        config = transformers.Qwen3_5Config(text_config=text | linear, vision_config=vision)
        cls = transformers.Qwen3_5ForConditionalGeneration
    elif kind == "gemma3":
        vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
        sliding = text | {"sliding_window": 16}
        config = transformers.Gemma3Config(text_config=sliding, vision_config=vision, mm_tokens_per_image=4)
        cls = transformers.Gemma3ForConditionalGeneration
    elif kind == "llama4":
        experts = {"intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1}
        vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "intermediate_size": 128}
        vision |= {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
        config = transformers.Llama4Config(text_config=text | experts | {"moe_layers": [1, 3]}, vision_config=vision)
        cls = transformers.Llama4ForConditionalGeneration
    else:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        vision |= {"depth": 2, "num_heads": 2, "out_hidden_size": 64}
        config = transformers.Qwen2_5_VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision)
        cls = transformers.Qwen2_5_VLForConditionalGeneration
    torch.manual_seed(0)
    return cls, saved(cls(config), folder)


@pytest.mark.parametrize("kind", some_slow(["qwen3_5", "gemma3", "llama4", "qwen2_5_vl"], {"qwen3_5", "llama4"}))
def test_a_wrapper_stays_the_wrapper_and_its_text_decoder_is_pruned(tmp_path: Path, kind: str) -> None:
    cls, source = wrapper(kind, tmp_path / "model")
    (source / "processor_config.json").write_text('{"image_seq_length": 4}')
    record = besa.compress(source, "wanda", out=tmp_path / "out", **SMALL).record
    assert assert_only_pruned(source, tmp_path / "out") > 0
    assert record.zeros * 2 == record.weights
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    changed = [name for name, tensor in before.items() if not same_bits(tensor, after[name])]
    assert not [name for name in changed if "visi" in name or "visual" in name or "projector" in name]
    config = json.loads((source / "config.json").read_text())
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found.pop("besa") and found == config
    assert (tmp_path / "out" / "processor_config.json").read_text() == '{"image_seq_length": 4}'
    _, told = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    assert besa.evaluate(tmp_path / "out", [str(TINY / "heldout.txt")], window=32, max_windows=2).sparsity == 0.5


@pytest.mark.parametrize("recipe", some_slow(["wanda", "wanda-int4"], {"wanda-int4"}))
def test_names_of_an_older_release_stay_in_the_files(tmp_path: Path, recipe: str) -> None:
    """Gemma 3's first checkpoints say language_model.model.layers; codes are written under such names too."""
    _, source = wrapper("gemma3", tmp_path / "model")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            older = name.replace("model.language_model.", "language_model.model.")
            tensors[older if older != name else name.removeprefix("model.")] = tensors.pop(name)

    change(source, rename)
    besa.compress(source, recipe, out=tmp_path / "out", **SMALL)
    if recipe == "wanda":
        assert assert_only_pruned(source, tmp_path / "out") == 4 * 7
        return
    linear = "language_model.model.layers.0.mlp.up_proj"
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert f"{linear}.weight_packed" in found and f"{linear}.weight" not in found
    besa.compress(source, recipe, out=tmp_path / "dense", dequantized=True, **SMALL)
    text = [str(TINY / "heldout.txt")]
    coded, dense = (
        besa.evaluate(tmp_path / name, text, window=32, max_windows=2).perplexity["heldout"]
        for name in ("out", "dense")
    )
    assert coded == dense


def test_infinite_bounds_are_no_damage_and_infinite_weights_are(tmp_path: Path) -> None:
    """A buffer may say by infinity that an expert is never chosen, or that there is no bound."""
    source = with_further_layer(tmp_path / "model")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    change(source, lambda tensors: tensors[bias][0].fill_(-torch.inf))
    record = besa.compress(source, "wanda", out=tmp_path / "out", **SMALL).record
    assert record.unreached == 2  # gate and up are one matrix
    assert same_bits(load_file(tmp_path / "out" / WEIGHTS)[bias], load_file(source / WEIGHTS)[bias])
    change(source, lambda tensors: tensors["model.norm.weight"][0].fill_(torch.inf))
    with pytest.raises(BesaError, match=r"model.norm.weight of .* holds NaN or infinity"):
        besa.compress(source, "fast", out=tmp_path / "again", **SMALL)


def with_own_code(folder: Path) -> Path:
    llama(folder)
    model, config = "modeling_tiny.py", "configuration_tiny.py"
    (folder / model).write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_tiny import TinyConfig\n"
        "class TinyForCausalLM(LlamaForCausalLM):\n    config_class = TinyConfig\n"
    )
    (folder / config).write_text(
        'from transformers import LlamaConfig\nclass TinyConfig(LlamaConfig):\n    model_type = "tinyown"\n'
    )
    places = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM"}
    configure(folder, model_type="tinyown", architectures=["TinyForCausalLM"], auto_map=places)
    return folder


def test_models_with_code_of_their_own_load_anywhere_afterwards(tmp_path: Path) -> None:
    source = with_own_code(tmp_path / "model")
    recipe = besa.Recipe.load("wanda", overrides=["allocation.method=structured"])
    trusted: dict[str, Any] = {"trust_remote_code": True}
    result = besa.compress(source, recipe, out=tmp_path / "out", **trusted, **SMALL)
    assert type(result.model).__name__ == "TinyForCausalLM"
    pack(tmp_path / "out", tmp_path / "packed", **trusted)
    unpack(tmp_path / "packed", tmp_path / "unpacked", **trusted)
    shrink(tmp_path / "out", tmp_path / "shrunk", **trusted)
    shutil.rmtree(source)
    logits = {}
    for name in ("out", "unpacked", "shrunk"):
        elsewhere = tmp_path / "elsewhere" / name
        shutil.copytree(tmp_path / name, elsewhere)
        model = AutoModelForCausalLM.from_pretrained(elsewhere, trust_remote_code=True)
        assert type(model).__name__ == "TinyForCausalLM"
        logits[name] = model(torch.arange(3, 20)[None]).logits
    assert torch.equal(logits["out"], logits["unpacked"])
    torch.testing.assert_close(logits["shrunk"], logits["out"], atol=1e-5, rtol=1e-5)
    text = [str(TINY / "heldout.txt")]
    found = [
        besa.evaluate(tmp_path / name, text, window=32, max_windows=2, **trusted).perplexity["heldout"]
        for name in ("out", "packed")
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_code_of_its_own_need_not_know_of_generation(tmp_path: Path) -> None:
    """As ChatGLM's, which is a plain PreTrainedModel, and takes token ids only."""
    source = with_own_code(tmp_path / "speechless")  # transformers keeps code by the folder's name
    (source / "modeling_tiny.py").write_text(
        "from transformers import LlamaModel, LlamaPreTrainedModel\nfrom torch import nn\n"
        "from transformers.modeling_outputs import CausalLMOutputWithPast\n"
        "from .configuration_tiny import TinyConfig\n"
        "class TinyForCausalLM(LlamaPreTrainedModel):\n"
        "    config_class = TinyConfig\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.model = LlamaModel(config)\n"
        "        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)\n"
        "        self.post_init()\n"
        "    def forward(self, input_ids, use_cache=False):\n"
        "        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids)[0]))\n"
    )
    trusted: dict[str, Any] = {"trust_remote_code": True}
    assert besa.plan(source, "wanda", **trusted).blocks == 2
    besa.compress(source, "wanda", out=tmp_path / "speechless-out", **trusted, **SMALL)
    assert assert_only_pruned(source, tmp_path / "speechless-out") == 14
    with pytest.raises(BesaError, match="TinyForCausalLM cannot generate text"):
        besa.generate(tmp_path / "speechless-out", "The", **trusted)
    llama(tmp_path / "known")
    besa.compress(tmp_path / "known", "wanda", out=tmp_path / "known-out", **SMALL)
    text = [str(TINY / "heldout.txt")]
    found, expected = (
        besa.evaluate(tmp_path / name, text, window=32, max_windows=2, **trusted).perplexity
        for name in ("speechless-out", "known-out")
    )
    assert found == expected


def test_no_function_runs_code_that_is_not_trusted(tmp_path: Path) -> None:
    source, out, text = with_own_code(tmp_path / "distrusted"), tmp_path / "out", [str(TINY / "heldout.txt")]
    calls: dict[str, Callable[..., Any]] = {
        "bench": lambda **trust: besa.bench([source], rounds=1, **trust),
        "compress": lambda **trust: besa.compress(source, "wanda", out=out, **trust, **SMALL),
        "evaluate": lambda **trust: besa.evaluate(source, text, window=32, max_windows=1, **trust),
        "generate": lambda **trust: besa.generate(source, "The", max_new_tokens=1, **trust),
        "inspect": lambda **trust: inspect(locate(source, **trust)),
        "load": lambda **trust: besa.load(source, **trust),
        "plan": lambda **trust: besa.plan(source, "wanda", seqlen=32, **trust),
        "simulate": lambda **trust: besa.simulate(source, [1], **trust),
    }
    for name, call in calls.items():
        with pytest.raises(BesaError, match="it needs model code of its own; pass --trust-remote-code"):
            call()
        assert call(trust_remote_code=True), name
    trusted = {"trust_remote_code": True}
    besa.compress(
        source,
        besa.Recipe.load("wanda", overrides=["allocation.method=structured"]),
        out=tmp_path / "dead",
        **trusted,
        **SMALL,
    )
    for name, rewrite in {"pack": pack, "shrink": shrink}.items():
        with pytest.raises(BesaError, match="it needs model code of its own; pass --trust-remote-code"):
            rewrite(tmp_path / "dead", tmp_path / name)


def test_code_that_leaves_python_is_one_sentence(tmp_path: Path) -> None:
    source = with_own_code(tmp_path / "leaving")
    (source / "modeling_tiny.py").write_text("import sys\nsys.exit('I need a licence key')\n")
    with pytest.raises(BesaError, match="cannot be read: I need a licence key"):
        besa.compress(source, "wanda", out=tmp_path / "out", trust_remote_code=True, **SMALL)


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    source = llama(tmp_path / "model")
    (tmp_path / "secret.txt").write_text("of somebody else")
    (source / "merges.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(BesaError, match=r"merges.txt is a link to a file outside"):
        pack(source, tmp_path / "packed")
    with pytest.raises(BesaError, match=r"merges.txt is a link to a file outside"):
        besa.compress(source, "wanda", out=tmp_path / "out", **SMALL)
    (source / "merges.txt").unlink()
    (source / "merges.txt").symlink_to("tokenizer.json")  # within
    besa.compress(source, "wanda", out=tmp_path / "out", **SMALL)
    assert (tmp_path / "out" / "merges.txt").read_bytes() == (source / "tokenizer.json").read_bytes()
    (source / "besa_run.json").symlink_to(tmp_path / "secret.txt")  # which `pack` copies, and `push` would publish
    with pytest.raises(BesaError, match=r"besa_run.json is a link to a file outside"):
        pack(source, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_file_whose_name_is_no_text_is_refused_before_the_work(tmp_path: Path) -> None:
    source = llama(tmp_path / "model")
    (source / os.fsdecode(b"LICENSE\xff.txt")).write_text("a b")
    with pytest.raises(BesaError, match="not UTF-8: rename that file"):
        besa.compress(source, "wanda", out=tmp_path / "out", **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("shared", [False, True])
def test_the_cache_of_the_hub_is_made_of_links(tmp_path: Path, shared: bool) -> None:
    source = llama(tmp_path / "model")
    store, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    store.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(store / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
        if shared:  # by all repositories: files of Xet, since huggingface_hub 2
            (tmp_path / "blobs").mkdir(exist_ok=True)
            (store / str(number)).rename(tmp_path / "blobs" / path.name)
            (store / str(number)).symlink_to(Path("..", "..", "blobs", path.name))
    besa.compress(snapshot, "wanda", out=tmp_path / "out", **SMALL)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


OLDER = """
import sys, torch, transformers
from functools import partial
assert transformers.__version__ == "4.57.3", transformers.__version__
load = partial(transformers.AutoModelForCausalLM.from_pretrained, dtype="auto")
before, after = load(sys.argv[1]), load(sys.argv[2])
x = torch.arange(5, 205)[None]
assert before.config.rope_theta == after.config.rope_theta == 500000.0
assert before.dtype == after.dtype == torch.bfloat16
assert torch.equal(before(x).logits, after(x).logits)
assert before.generation_config.to_dict() == after.generation_config.to_dict()
assert transformers.AutoTokenizer.from_pretrained(sys.argv[2])("a word") == transformers.AutoTokenizer.from_pretrained(
    sys.argv[1]
)("a word")
"""


@pytest.mark.slow
def test_older_and_present_transformers_load_the_result_alike(tmp_path: Path) -> None:
    source = older_llama(tmp_path / "model")
    (source / "tokenizer.model").unlink()  # of no real tokenizer
    besa.compress(source, "wanda", out=tmp_path / "out", sparsity=0, **SMALL)
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "out"))
    x = torch.arange(5, 205)[None]
    assert torch.equal(before(x).logits, after(x).logits)
    older = tmp_path / "older"  # beside the packages of this environment, and before them
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", f"--target={older}", "transformers==4.57.3"], check=True
    )
    for package in [*older.glob("numpy*"), *older.glob("torch*")]:
        shutil.rmtree(package)
    run = subprocess.run(
        [sys.executable, "-c", OLDER, str(source), str(tmp_path / "out")],
        env={"PYTHONPATH": str(older), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
