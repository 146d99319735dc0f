"""Packed checkpoints in plain transformers: `from_pretrained`, pipelines and saving, with and without `import besa`."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DeepseekV32Config,
    PreTrainedModel,
    pipeline,
)

import besa
import besa_hook
from besa import BesaError, Recipe
from besa.checkpoint import writer
from besa.runtime.linear import SparseLinear
from besa.storage.formats import bitmask
from tests import pretend
from tests.slowly import some_slow

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
TEXT = str(TINY / "calibration.txt")
SIZES = {"samples": 2, "seqlen": 16}
PROMPT = "The city lies on the river"
FORMS = {  # each leaves one linear of a block as it was: dense, or stored as codes
    "float32": "wanda",
    "codes": "wanda-int4",
}


def packed(folder: Path, recipe: Recipe) -> Path:
    besa.compress(TINY, recipe, TEXT, out=folder / "dense", **SIZES)
    besa.pack(folder / "dense", folder / "packed")
    return folder / "packed"


@pytest.fixture(scope="module", params=some_slow([*FORMS, "shards"], {"float32", "shards"}))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    recipe = Recipe.load(FORMS.get(request.param, "wanda")).with_exceptions(["*.k_proj"], [])
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "shards":
            patch.setattr(writer, "ONE_FILE", 0)
        return packed(folder, recipe)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("plain"), Recipe.load("wanda"))


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Without `no_grad`, as in anybody's notebook."""
    return model(torch.arange(48).view(2, -1)).logits


def sparse(model: nn.Module) -> int:
    return sum(isinstance(module, SparseLinear) for module in model.modules())


def test_from_pretrained_gives_the_model_of_besa_load(folder: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    own, dense = besa.load(folder), besa.load(folder.parent / "dense")
    assert sparse(model) == sparse(own) > 0
    assert torch.equal(logits(model), logits(own))
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_weights_are_mapped_from_their_file(plain: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain)
    file = str((plain / "bitmask.safetensors").resolve())
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(file)]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    for module in model.modules():
        if isinstance(module, SparseLinear):
            address = module.bitmask.values.data_ptr()
            assert any(begin <= address < end for begin, end in ranges)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_another_dtype(folder: Path, dtype: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {tensor.dtype for tensor in model.parameters()} == {getattr(torch, dtype)}
    assert torch.equal(logits(model), logits(besa.load(folder, dtype=dtype)))


def test_pipeline_and_generate_continue_a_text(folder: Path) -> None:
    generator = pipeline("text-generation", model=str(folder))
    [made] = generator(PROMPT, max_new_tokens=12, do_sample=False, return_full_text=False)
    assert made["generated_text"] == besa.generate(folder, PROMPT, max_new_tokens=12)


def test_the_model_without_its_head(folder: Path) -> None:
    inner, whole = AutoModel.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(24)[None]
    expected = whole(tokens, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(inner(tokens).last_hidden_state, expected)
    assert sparse(inner) == sparse(whole)


@pytest.mark.parametrize("size", ["50GB", "300KB"])
def test_a_saved_model_is_a_packed_checkpoint(folder: Path, size: str, tmp_path: Path) -> None:
    """It loads again here and in besa, and without besa it is refused as what `besa pack` wrote."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for _ in range(2):  # again into the same folder
        model.save_pretrained(tmp_path / "saved", max_shard_size=size)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "bitmask.safetensors").exists() == (size == "50GB")
    assert not [*(tmp_path / "saved").glob("model*"), *(tmp_path / "saved").glob(".*")]
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    for loaded in (again, besa.load(tmp_path / "saved")):
        assert torch.equal(logits(loaded), logits(model))
    assert "transformers_weights" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    with pytest.raises(BesaError, match="saved first, and then pushed"):
        model.save_pretrained(tmp_path / "other", push_to_hub=True)


def test_a_save_replaces_what_was_saved_there(plain: Path, tmp_path: Path) -> None:
    """Whole, in shards, dense, and the very files that the model is mapped from."""
    shutil.copytree(plain, tmp_path / "saved", ignore=shutil.ignore_patterns("besa_run.json"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    expected = logits(model)
    model.model.norm.weight.mul_(2)
    others = {tmp_path / "saved" / f"{name}.safetensors" for name in ("model.fp16", "model_backup", "adapter_model")}
    for path in others:  # of the user's
        path.write_bytes(b"own")
    for size in ("300KB", "50GB"):
        AutoModelForCausalLM.from_pretrained(plain.parent / "dense").save_pretrained(tmp_path / "saved")
        model.save_pretrained(tmp_path / "saved", max_shard_size=size)
        assert all(path.read_bytes() == b"own" for path in others)
        names = {path.name for path in {*(tmp_path / "saved").glob("*.safetensors*")} - others}
        assert all(name.startswith("bitmask") for name in names)
        assert ("bitmask.safetensors" in names) == (size == "50GB") == (len(names) == 1)
        for loaded in (besa.load(tmp_path / "saved"), AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
            torch.testing.assert_close(logits(loaded), 2 * expected)


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_save_that_is_stopped_loses_nothing(
    done: int, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some of its files are in place, config.json as the last."""
    model = AutoModelForCausalLM.from_pretrained(plain)
    model.save_pretrained(tmp_path / "saved")
    old = logits(model)
    model.model.norm.weight.mul_(2)
    placed = []

    def stopping(usual: Callable[..., None], source: Path, target: Path, **options: object) -> None:
        if Path(target).parent == tmp_path / "saved":
            if len(placed) == done:
                raise KeyboardInterrupt
            placed.append(Path(target).name)
        usual(source, target, **options)

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(os, name, partial(stopping, getattr(os, name)))
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(tmp_path / "saved")
    assert placed == ["bitmask.safetensors", "generation_config.json"][:done]
    found = logits(besa.load(tmp_path / "saved"))
    assert torch.equal(found, logits(model) if placed else old) and not torch.equal(logits(model), old)


def test_a_model_made_dense_is_an_ordinary_one(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).dequantize()
    expected = AutoModelForCausalLM.from_pretrained(folder.parent / "dense")
    assert sparse(model) == 0
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)
    model.requires_grad_(True)
    logits(model).sum().backward()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_model_that_was_saved_is_made_dense(folder: Path, tmp_path: Path) -> None:
    """Saving leaves the name of its dtype in its configuration."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert isinstance(model.config.dtype, str)
    dense = model.dequantize()
    assert {type(module) for module in dense.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    torch.testing.assert_close(logits(dense), expected, rtol=1e-5, atol=1e-5)


def test_a_model_made_dense_in_another_dtype_is_of_that_dtype(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).dequantize(torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(folder).dequantize().state_dict()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32  # as where transformers loads in this dtype
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in expected.items())
    assert logits(model).isfinite().all()


def test_a_refused_dtype_changes_nothing(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = logits(model)
    for refused in (lambda: model.to(torch.float16), lambda: nn.ModuleList([model]).to(torch.float16)):
        with pytest.raises(BesaError, match="Packed linears keep their dtype"):
            refused()
        assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
        assert torch.equal(logits(model), expected)


def test_another_head_is_refused(plain: Path) -> None:
    with pytest.raises(BesaError, match=r"packed holds a LlamaForCausalLM, no LlamaForSequenceClassification: for"):
        AutoModelForSequenceClassification.from_pretrained(plain)


def test_device_maps(plain: Path) -> None:
    """What lies on another device than its input would be an error."""
    expected = logits(besa.load(plain))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(plain, device_map="cpu")), expected)
    model = AutoModelForCausalLM.from_pretrained(plain, device_map={"": pretend.DEVICE})
    assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {pretend.DEVICE}
    found = model(torch.arange(48).view(2, -1).to(pretend.DEVICE)).logits
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_weights_that_would_stay_on_the_disk_are_refused(plain: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    layers = {f"model.layers.{number}": "disk" if number else "cpu" for number in range(8)}
    with pytest.raises(BesaError, match="cannot be offloaded"):
        AutoModelForCausalLM.from_pretrained(
            plain, device_map=places | layers, offload_folder=str(tmp_path), offload_buffers=True
        )


def test_dense_parts_may_lie_on_the_disk(folder: Path, tmp_path: Path) -> None:
    """A head, and a linear that was not packed: accelerate brings their weights for each call."""
    loaded = besa.load(folder)
    expected = logits(loaded)
    places = {name: "cpu" for name, module in loaded.named_modules() if not [*module.children()]}
    places |= {"model.layers.0.self_attn.k_proj": "disk", "model.layers.3.self_attn.k_proj": "disk"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=str(tmp_path))
    assert model.model.layers[3].self_attn.k_proj.weight.is_meta
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_numbers_that_do_not_fit_are_never_read(plain: Path) -> None:
    """Kernels would read past their end."""
    model = AutoModelForCausalLM.from_pretrained(plain)
    expected, state = logits(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = AutoModelForCausalLM.from_pretrained(plain).dequantize()
    name = "model.layers.0.mlp.up_proj"
    other.get_submodule(name).weight.data[:, ::3] = 0
    weight = SparseLinear(bitmask.pack(other.get_submodule(name).weight.detach()))
    with pytest.raises(BesaError, match=rf"^The sparse weight {name} has another number of zeros than the model's"):
        model.load_state_dict(state | {f"{name}.{key}": tensor for key, tensor in weight.state_dict().items()})
    assert torch.equal(logits(model), expected)
    model.to_empty(device="cpu")
    for part in model.modules():
        if isinstance(part, SparseLinear):
            part.weight_offsets.fill_(2**40)
    with pytest.raises(BesaError, match=r"of a layer that was moved is damaged: its masks and values do not fit"):
        model.get_submodule(name)(torch.ones(1, weight.in_features))
    model.load_state_dict(state)
    x = torch.randn(1, weight.in_features)
    assert torch.equal(model.get_submodule(name)(x), AutoModelForCausalLM.from_pretrained(plain).get_submodule(name)(x))


def test_a_part_cannot_be_cast_either(plain: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain)
    expected = logits(model)
    with pytest.raises(BesaError, match="Packed linears keep their dtype"):
        model.model.half()
    assert torch.equal(logits(model), expected)
    assert model.dequantize().model.half().dtype == torch.float16


def test_adapters_are_saved_alone(plain: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain)
    model.add_adapter(peft.LoraConfig(target_modules=["lm_head"]))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json"}
    assert not list(tmp_path.glob("bitmask*"))


def test_damage_is_refused_here_too(plain: Path, tmp_path: Path) -> None:
    config = json.loads((plain / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    (tmp_path / "bitmask.safetensors").symlink_to(plain / "bitmask.safetensors")
    with pytest.raises(BesaError, match=r"lacks the weight model.layers.8."):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(BesaError, match=r"lacks the weight (model\.)?layers\.8\."):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("other", ["model.safetensors", "bitmask.safetensors"])
def test_weights_of_two_checkpoints_are_refused(other: str, plain: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(plain).save_pretrained(tmp_path, max_shard_size="300KB")
    source = plain if other.startswith("bitmask") else plain.parent / "dense"
    shutil.copyfile(source / other, tmp_path / other)
    with pytest.raises(BesaError, match="weight files of two checkpoints"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_linears_that_transformers_keeps_in_float32(tmp_path: Path) -> None:
    """It casts all tensors of such a linear, its masks too, which would then be other masks."""
    sizes = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    ranks = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    indexer = {"index_n_heads": 4, "index_head_dim": 32, "index_topk": 8}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DeepseekV32Config(**sizes, **heads, **experts, **ranks, **indexer)).half()
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and ".layers." in name:
            weight.data[torch.rand(weight.shape) < 0.6] = 0
    model.save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "dense")
    besa.pack(tmp_path / "dense", tmp_path / "packed")
    dense, found = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dense", "packed"))
    kept = found.model.layers[0].self_attn.indexer.weights_proj
    assert isinstance(kept, SparseLinear)
    assert kept.weight.dtype == torch.float32
    assert torch.equal(kept.weight, dense.model.layers[0].self_attn.indexer.weights_proj.weight)
    torch.testing.assert_close(logits(found), logits(dense), rtol=1e-2, atol=1e-2)
    for dtype in (torch.float16, torch.bfloat16):
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype).state_dict()
        made = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").dequantize(dtype).state_dict()
        assert {name: tensor.dtype for name, tensor in made.items()} == {
            name: tensor.dtype for name, tensor in expected.items()
        }
        kept_dtype = made["model.layers.0.self_attn.indexer.weights_proj.weight"].dtype
        assert kept_dtype == (torch.float32 if dtype == torch.float16 else dtype)


def test_version_1_loads_in_besa(folder: Path, tmp_path: Path) -> None:
    """besa 0.1 kept the header under its own key, which no other program reads."""
    config = json.loads((folder / "config.json").read_text())
    about = config.pop("quantization_config")
    config["besa"] |= {"format": "bitmask", "version": 1}
    if "codes" in about:
        config["besa"]["quantization_config"] = about["codes"]
    for path in folder.iterdir():
        if path.name not in ("config.json", "besa_run.json"):
            shutil.copyfile(path, tmp_path / path.name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = besa.load(tmp_path)
    assert sparse(model) == sparse(besa.load(folder))
    assert torch.equal(logits(model), logits(besa.load(folder)))
    besa.unpack(tmp_path, out := tmp_path.with_name(f"{tmp_path.name}-out"))
    assert torch.equal(logits(besa.load(out)), logits(besa.load(folder.parent / "dense")))
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "saved")
    besa.unpack(tmp_path / "saved", tmp_path / "unpacked")
    model.dequantize().save_pretrained(tmp_path / "dense")
    for made in ("unpacked", "dense"):
        assert "version" not in json.loads((tmp_path / made / "config.json").read_text()).get("besa", {})
        torch.testing.assert_close(logits(besa.load(tmp_path / made)), logits(besa.load(folder.parent / "dense")))


# Programs that do not import besa.

LOAD = """
import sys, torch
assert "besa" not in sys.modules, "torch imports besa itself"
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""
BLOCKED = """
import sys
class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("besa", "besa_hook"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


def program(code: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, timeout=900)


def test_a_program_that_does_not_import_besa(plain: Path) -> None:
    made = program(LOAD, plain)
    assert made.stdout.split() == ["SparseLinear"], made.stderr


@pytest.mark.parametrize(
    "variable", some_slow(["BESA_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"], {"TORCH_DEVICE_BACKEND_AUTOLOAD"})
)
@pytest.mark.slow
def test_a_variable_turns_it_off(variable: str, plain: Path) -> None:
    made = program(LOAD, plain, **{variable: "0"})
    assert made.returncode == 1
    assert "OSError: Error no file named model.safetensors" in made.stderr


@pytest.mark.slow
def test_without_besa_there_is_an_error_and_no_random_model(plain: Path, tmp_path: Path) -> None:
    """Of what `besa pack` wrote, and of what `save_pretrained` wrote of it."""
    AutoModelForCausalLM.from_pretrained(plain).save_pretrained(tmp_path)
    for folder in (plain, tmp_path):
        made = program(BLOCKED + LOAD, folder, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
        assert made.returncode == 1
        assert "OSError: Error no file named model.safetensors" in made.stderr
        assert "Unknown quantization type, got besa" in made.stderr


@pytest.mark.slow
def test_a_broken_besa_breaks_neither_torch_nor_transformers(plain: Path) -> None:
    broken = "import sys; sys.modules['besa.integrations.quantizer'] = None\n"
    made = program(broken + LOAD, plain)
    assert "besa could not register with transformers" in made.stderr
    assert "OSError: Error no file named model.safetensors" in made.stderr


@pytest.mark.slow
def test_whichever_is_imported_first(plain: Path) -> None:
    for first, second in (("besa", "transformers"), ("transformers.quantizers", "besa")):
        code = f"import {first}, {second}\n" + LOAD.replace('assert "besa" not in', "assert [] is not")
        made = program(code, plain, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
        assert made.stdout.split() == ["SparseLinear"], made.stderr


def test_the_hook_waits_once_and_for_one_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.delitem(sys.modules, besa_hook.REGISTRY)
    besa_hook.install()
    besa_hook.install()
    [waiting] = sys.meta_path
    assert waiting.find_spec("transformers.quantizers", None) is None
    assert sys.meta_path == [waiting]


@pytest.mark.slow
def test_the_registry_may_be_what_imports_torch(plain: Path) -> None:
    """Then besa comes while the registry is half imported."""
    made = program("import transformers.quantizers\n" + LOAD, plain)
    assert made.stdout.split() == ["SparseLinear"], made.stderr
