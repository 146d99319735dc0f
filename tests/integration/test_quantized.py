"""Pruned and quantised checkpoints: loaded by transformers alone, zeros intact, sizes as told."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    MixtralConfig,
    NanoChatConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
)

import besa
from besa import BesaError, Recipe
from besa.api import Compressed
from besa.checkpoint.inspection import inspect
from besa.checkpoint.shrinking import shrink
from besa.models.finding import find_blocks
from besa.models.source import locate
from besa.simulator import cycles
from tests.slowly import some_slow

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
TEXT = str(TINY / "calibration.txt")
SIZES = {"samples": 8, "seqlen": 32}


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory, shallow_llama_folder: Path) -> Compressed:
    out = tmp_path_factory.mktemp("joint") / "out"
    recipe = Recipe.load("besa-int4", overrides=["quantization.group=32"])
    return besa.compress(shallow_llama_folder, recipe, TEXT, out=out, **SIZES)


def decompressed(folder: Path) -> PreTrainedModel:
    """As anybody loads it; the first forward pass makes the weights."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    return model


def prunable(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }


def test_transformers_alone_loads_the_same_weights(
    joint: Compressed, tmp_path: Path, shallow_llama_folder: Path
) -> None:
    recipe = Recipe.load("besa-int4", overrides=["quantization.group=32"])
    dense = besa.compress(shallow_llama_folder, recipe, TEXT, out=tmp_path / "dense", dequantized=True, **SIZES)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    expected = prunable(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    found = prunable(decompressed(joint.out))
    assert found.keys() == expected.keys()
    assert len(found) == 3 * 7
    for name, w_OI in found.items():
        assert torch.equal(w_OI, expected[name]), name
    zeros, weights = (sum(f(w_OI) for w_OI in found.values()) for f in (lambda w: int((w == 0).sum()), torch.numel))
    assert zeros == joint.record.zeros == weights // 2
    assert dense.record.zeros == zeros


def test_clipping_is_learned_where_nothing_is_pruned(shallow_llama_folder: Path) -> None:
    """Jointly too, at sparsity 0 and beside matrices that are pruned."""

    def errors(clipping: str, *exceptions: str) -> list[float]:
        settings = ["quantization.bits=3", f"quantization.clipping={clipping}"]
        recipe = Recipe.load("besa-int4", 0.5 if exceptions else 0.0, settings).with_exceptions([], exceptions)
        blocks = besa.compress(shallow_llama_folder, recipe, TEXT, **SIZES).record.blocks
        return [block.reconstruction_error for block in blocks]

    joint, first, none = (errors(clipping) for clipping in ("joint", "first", "none"))
    assert joint == first
    assert max(joint) < 0.9 * min(none)
    beside = [errors(clipping, "*mlp*=0") for clipping in ("joint", "none")]
    assert all(learned < 0.9 * least for learned, least in zip(*beside, strict=True))


def test_few_values_in_each_group(joint: Compressed) -> None:
    for w_OI in prunable(decompressed(joint.out)).values():
        for part in w_OI.reshape(-1, 32)[:50]:
            assert part.unique().numel() <= 16


@pytest.mark.slow
def test_a_fresh_process_without_besa_gives_the_same_output(joint: Compressed) -> None:
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; "
        f"model = AutoModelForCausalLM.from_pretrained({str(joint.out)!r}).eval(); "
        "logits = model(torch.arange(20)[None]).logits; assert 'besa' not in sys.modules; "
        "print(float(logits.double().abs().sum()))"
    )
    alone = os.environ | {"BESA_AUTOLOAD": "0"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=alone)
    with torch.no_grad():
        logits = decompressed(joint.out)(torch.arange(20)[None]).logits
    assert float(run.stdout) == pytest.approx(float(logits.double().abs().sum()), rel=1e-6)


def test_perplexity_of_the_packed_checkpoint_is_that_of_the_dense_one(
    joint: Compressed, tmp_path: Path, shallow_llama_folder: Path
) -> None:
    recipe = Recipe.load("besa-int4", overrides=["quantization.group=32"])
    besa.compress(shallow_llama_folder, recipe, TEXT, out=tmp_path / "dense", dequantized=True, **SIZES)
    text = str(TINY / "heldout.txt")
    found, expected = (
        besa.evaluate(folder, [text], window=64, max_windows=8).perplexity["heldout"]
        for folder in (joint.out, tmp_path / "dense")
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_codes_are_read_without_the_bars_of_their_reader(joint: Compressed, capsys: pytest.CaptureFixture) -> None:
    besa.load(joint.out)
    assert capsys.readouterr().err == ""


SETTINGS = {  # of all linears, of the group of those that are codes, and of their weights; and what is said of them
    "no linears": ({}, {"targets": []}, {}, "no numbers for model.layers.0.*: its configuration does not fit"),
    "fewer linears": ({"ignore": ["lm_head", "re:.*o_proj"]}, {}, {}, "no numbers for .*layers.0.self_attn.o_proj"),
    "unknown quantiser": ({"quant_method": "none"}, {}, {}, "no numbers for model.layers.0.*: its configuration does"),
    "larger groups": ({}, {}, {"group_size": 96}, "cannot be read"),
    "infinite bits": ({}, {}, {"num_bits": float("inf")}, "how many bits"),
    "symmetric": ({}, {}, {"symmetric": True}, "it has a weight_zero_point, though config.json says symmetric"),
    "no symmetry": ({}, {}, {"symmetric": None}, "whether its codes are symmetric"),
}


@pytest.mark.parametrize("damage", SETTINGS)
def test_settings_that_do_not_fit_the_codes_are_refused(damage: str, joint: Compressed, tmp_path: Path) -> None:
    of_all, of_group, of_weights, says = SETTINGS[damage]
    folder = shutil.copytree(joint.out, tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    quantization["config_groups"]["group_0"]["weights"] |= of_weights
    quantization["config_groups"]["group_0"] |= of_group
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization | of_all}))
    with pytest.raises(BesaError, match=says):
        besa.load(folder)


def test_codes_without_their_zero_points_are_refused(joint: Compressed, tmp_path: Path) -> None:
    folder = shutil.copytree(joint.out, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_zero_point"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for action in (lambda: besa.load(folder), lambda: besa.pack(folder, tmp_path / "out")):
        with pytest.raises(BesaError, match=r"layers.1.mlp.up_proj is damaged: it has no weight_zero_point"):
            action()


def test_inspect_counts_what_is_in_the_files(joint: Compressed) -> None:
    found = inspect(locate(joint.out))
    assert (found.zeros, found.weights) == (joint.record.zeros, joint.record.weights)
    assert found.file_bytes == (joint.out / "model.safetensors").stat().st_size
    with safe_open(joint.out / "model.safetensors", "pt") as file:
        packed = {
            name: file.get_tensor(name) for name in sorted(file.keys()) if ".layers." in name and "norm" not in name
        }
    assert found.bytes == sum(tensor.nbytes for tensor in packed.values())
    linear = next(linear for linear in found.linears if linear.name.endswith("layers.2.mlp.up_proj"))
    own = {name: tensor for name, tensor in packed.items() if "layers.2.mlp.up_proj" in name}
    assert linear.parts["values"] == next(t.nbytes for n, t in own.items() if n.endswith("weight_packed"))
    assert linear.parts["scales"] == next(t.nbytes for n, t in own.items() if n.endswith("weight_scale"))
    assert linear.parts["zero points"] == next(t.nbytes for n, t in own.items() if n.endswith("weight_zero_point"))
    assert linear.bytes == sum(linear.parts.values())
    assert found.bits_per_weight == pytest.approx(8 * found.bytes / found.weights)
    assert [block.weights for block in found.blocks] == [block.weights for block in joint.record.blocks]


def test_linears_of_codes_have_the_order_of_the_model(joint: Compressed, shallow_llama_folder: Path) -> None:
    found, dense = (inspect(locate(folder)) for folder in (joint.out, shallow_llama_folder))
    assert [linear.name for linear in found.linears] == [linear.name for linear in dense.linears]


def test_codes_are_not_shrunk(joint: Compressed, tmp_path: Path) -> None:
    with pytest.raises(BesaError, match="is quantised and cannot be shrunk: shrink before quantising, or what `besa"):
        shrink(joint.out, tmp_path / "out")


def test_inspect_leaves_out_what_is_no_part_of_a_block(joint: Compressed, tmp_path: Path) -> None:
    folder = shutil.copytree(joint.out, tmp_path / "further")
    tensors = load_file(folder / "model.safetensors") | {"vision_tower.layers.0.proj.weight": torch.zeros(8, 8)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    expected, found = inspect(locate(joint.out)), inspect(locate(folder))
    assert (found.linears, found.blocks) == (expected.linears, expected.blocks)


def test_a_packed_checkpoint_is_simulated_by_its_zeros(joint: Compressed) -> None:
    found = besa.simulate(joint.out, tokens=[1])
    weights = prunable(decompressed(joint.out))
    assert {linear.name for linear in found.linears} == weights.keys()
    for linear in found.linears:
        w_OI = weights[linear.name]
        expected = cycles((w_OI != 0).sum(dim=0), w_OI.shape[0], found.accelerator)
        assert (linear.cycles_corrected, linear.cycles_published) == (expected.corrected, expected.published)
        assert linear.nnz == int((w_OI != 0).sum())


@pytest.mark.parametrize("symmetric", some_slow([True, False], {True}))
def test_what_was_codes_in_a_packed_model_is_saved_as_numbers(
    symmetric: bool, shallow_llama_folder: Path, tmp_path: Path
) -> None:
    overrides = ["quantization.group=32", f"quantization.symmetric={str(symmetric).lower()}"]
    recipe = Recipe.load("wanda-int4", 0.5, overrides).with_exceptions((), ("*.up_proj=0.15",))
    besa.compress(shallow_llama_folder, recipe, TEXT, out=tmp_path / "out", **SIZES)
    assert besa.pack(tmp_path / "out", tmp_path / "packed").packed < 3 * 7  # so few zeros make no bitmask
    model = besa.load(tmp_path / "packed")
    model.save_pretrained(tmp_path / "saved")
    besa.unpack(tmp_path / "saved", tmp_path / "unpacked")
    tokens_NT = torch.arange(40)[None]
    with torch.no_grad():
        expected = model(tokens_NT).logits
        for folder in ("out", "saved", "unpacked"):
            torch.testing.assert_close(besa.load(tmp_path / folder)(tokens_NT).logits, expected, rtol=1e-4, atol=1e-4)
        found = decompressed(tmp_path / "unpacked")(tokens_NT).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", some_slow(["wanda-int4", "besa-rtn4", "int4"], {"besa-rtn4"}))
def test_baselines(recipe: str, tmp_path: Path, shallow_llama_folder: Path) -> None:
    result = besa.compress(shallow_llama_folder, recipe, TEXT, out=tmp_path / "out", **SIZES)
    weights = prunable(decompressed(tmp_path / "out"))
    zeros = sum(int((w_OI == 0).sum()) for w_OI in weights.values())
    assert zeros == result.record.zeros
    if recipe == "int4":
        assert 0 < result.record.sparsity < 0.4  # what rounding leaves
    else:
        assert result.record.sparsity == 0.5
    assert all(w_OI[0].unique().numel() <= 16 for w_OI in weights.values())


@pytest.mark.parametrize("clipping", ["none", "first"])
def test_q_of_w_may_decide_the_order(clipping: str, tmp_path: Path, shallow_llama_folder: Path) -> None:
    settings = ["importance.method=magnitude", "quantization.bits=3", f"quantization.clipping={clipping}"]
    masks = []
    for ranks in ("weight", "quantized"):
        recipe = Recipe.load("wanda-int4", overrides=[*settings, f"quantization.ranks={ranks}"])
        besa.compress(shallow_llama_folder, recipe, TEXT, out=tmp_path / ranks, dequantized=True, **SIZES)
        masks.append({name: w_OI == 0 for name, w_OI in prunable(decompressed(tmp_path / ranks)).items()})
    assert any(not torch.equal(zero_OI, masks[1][name]) for name, zero_OI in masks[0].items())


def test_learned_clipping_pays(tmp_path: Path, shallow_llama_folder: Path) -> None:
    """On the loss it descends on: 3 bits with it against 3 bits of the whole range."""
    errors = {}
    for clipping in ("first", "none"):
        recipe = Recipe.load("int4", overrides=["quantization.bits=3", f"quantization.clipping={clipping}"])
        record = besa.compress(shallow_llama_folder, recipe, TEXT, samples=24, seqlen=64).record
        errors[clipping] = record.blocks[0].reconstruction_error
    assert errors["first"] < 0.95 * errors["none"]


def test_a_joint_run_goes_on_where_it_stopped(
    joint: Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shallow_llama_folder: Path
) -> None:
    from besa.storage.journal import Journal

    keep = Journal.keep

    def keep_three(self: Journal, tensors: object, record: object) -> None:
        keep(self, tensors, record)
        if record.index == 2:
            raise KeyboardInterrupt

    recipe = Recipe.load("besa-int4", overrides=["quantization.group=32"])
    monkeypatch.setattr(Journal, "keep", keep_three)
    with pytest.raises(besa.errors.Interrupted):
        besa.compress(shallow_llama_folder, recipe, TEXT, out=tmp_path / "out", **SIZES)
    monkeypatch.undo()
    besa.compress(shallow_llama_folder, recipe, TEXT, out=tmp_path / "out", resume=True, **SIZES)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (joint.out / "model.safetensors").read_bytes()


def test_skipped_linears_stay_as_they_are(tmp_path: Path, shallow_llama_folder: Path) -> None:
    recipe = Recipe.load("besa-int4").with_exceptions(["*.k_proj", "*.0.*"], [])
    besa.compress(shallow_llama_folder, recipe, TEXT, out=tmp_path / "out", **SIZES)
    found, before = (
        prunable(model)
        for model in (decompressed(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(shallow_llama_folder))
    )
    for name, w_OI in found.items():
        assert torch.equal(w_OI, before[name]) == (name.endswith("k_proj") or ".0." in name)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["allocation={method: uniform}"], "set quantization.clipping=first"),
        (["reconstruction.method=obs"], "reconstruction.method=none and distill.method=none"),
        (["quantization.bits=9"], "quantization.bits: input should be less than or equal to 8"),
        (["quantization.group=100"], "quantization.group: "),
    ],
)
def test_choices_that_do_not_fit_get_a_sentence(overrides: list[str], says: str) -> None:
    with pytest.raises(BesaError, match=says):
        Recipe.load("besa-int4", overrides=overrides)


def test_odd_groups_are_refused_before_the_work(tmp_path: Path, shallow_llama_folder: Path) -> None:
    recipe = Recipe.load("besa-int4", overrides=["quantization.group=64"])
    with pytest.raises(BesaError, match="96 columns"):
        besa.compress(shallow_llama_folder, recipe, TEXT, out=tmp_path / "out", **SIZES)
    assert list(tmp_path.iterdir()) == []


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """The model with the tokenizer of the tiny Llama, whose vocabulary has 1024 tokens."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    return folder


SIZE = {"vocab_size": 1024, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS = {"num_key_value_heads": 2, "intermediate_size": 96}
PLAIN = {
    "gemma3": Gemma3TextConfig(**SIZE, **HEADS, head_dim=16),
    "phi3": Phi3Config(**SIZE, **HEADS, pad_token_id=0),
    "gpt_neox": GPTNeoXConfig(**SIZE, intermediate_size=96),
}
OTHER = {
    "gpt2": GPT2Config(vocab_size=1024, n_embd=64, n_layer=2, n_head=4),  # transposed linears
    "falcon": FalconConfig(**SIZE),  # a linear of its own
    "mixtral": MixtralConfig(**SIZE, **HEADS, num_local_experts=4),  # a stack of experts
    # whatever a file holds, transformers initialises weights of linears anew
    "gpt_bigcode": GPTBigCodeConfig(vocab_size=1024, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    "nanochat": NanoChatConfig(**SIZE, **HEADS),
}


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", some_slow(PLAIN, {"gemma3", "gpt_neox"}))
def test_families_of_plain_linears(family: str, tmp_path: Path) -> None:
    folder = saved(random_model(PLAIN[family]), tmp_path / "dense")
    result = besa.compress(folder, "besa-int4", TEXT, out=tmp_path / "packed", **SIZES)
    assert result.record.sparsity == pytest.approx(0.5, abs=1 / result.record.weights)
    besa.compress(folder, "besa-int4", TEXT, out=tmp_path / "plain", dequantized=True, **SIZES)
    found = decompressed(tmp_path / "packed").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict().items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", some_slow(OTHER, OTHER.keys() - {"gpt2", "mixtral"}))
def test_what_transformers_could_not_load_packed_is_refused(family: str, tmp_path: Path) -> None:
    folder = saved(random_model(OTHER[family]), tmp_path / "dense")
    with pytest.raises(BesaError, match="--dequantized"):
        besa.compress(folder, "besa-int4", TEXT, out=tmp_path / "out", **SIZES)
    assert not (tmp_path / "out.partial").exists()
    result = besa.compress(folder, "besa-int4", TEXT, out=tmp_path / "out", dequantized=True, **SIZES)
    assert result.record.sparsity == pytest.approx(0.5, abs=1 / result.record.weights)
    for block in find_blocks(result.model):
        for name in block.prunables:
            assert all(row.unique().numel() <= 16 for row in block.weight(name))


def test_the_plan_knows_how_small_it_gets(joint: Compressed, shallow_llama_folder: Path) -> None:
    recipe = Recipe.load("besa-int4", overrides=["quantization.group=32"])
    planned = besa.plan(shallow_llama_folder, recipe, **SIZES)
    written = (joint.out / "model.safetensors").stat().st_size
    assert planned.checkpoint_bytes == pytest.approx(written, rel=0.05)


def test_int4_takes_models_that_have_zeros(tmp_path: Path, shallow_llama_folder: Path) -> None:
    """Nothing is pruned, so no zero is too many."""
    model = AutoModelForCausalLM.from_pretrained(shallow_llama_folder)
    model.model.layers[0].mlp.up_proj.weight.data[:3, :5] = 0
    folder = saved(model, tmp_path / "dense")
    record = besa.compress(folder, "int4", TEXT, out=tmp_path / "out", **SIZES).record
    assert record.zeros > 15
