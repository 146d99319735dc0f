"""Packed models as they run: what they put out, where their weights are, what they refuse; and how speed is told."""

import copy
import json
import math
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import jvp
from transformers import (
    AutoTokenizer,
    DeepseekV3Config,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    JambaConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

import besa
from besa import BesaError, Recipe, cli
from besa.checkpoint.inspection import inspect
from besa.counting import widening
from besa.kernels import attention, norm
from besa.models.source import locate
from besa.runtime import speed, timings
from besa.runtime.fastest import PrepackedLinear, WidenedLinear, fastest
from besa.runtime.linear import SparseLinear
from besa.runtime.timings import Bench, ModelSpeed, Timing
from besa.storage.formats import bitmask
from besa.storage.formats.container import MASK, VALUES
from tests import pretend
from tests.halved_models import halved
from tests.slowly import some_slow

TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
TEXT, HELDOUT = str(TINY / "calibration.txt"), str(TINY / "heldout.txt")
SIZES = {"samples": 2, "seqlen": 16}
PROMPT = "The city lies on the river"


@pytest.fixture(scope="module", params=["float32", "joint"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pruned checkpoint, and the same packed."""
    folder = tmp_path_factory.mktemp(request.param)
    recipe = "wanda" if request.param == "float32" else "wanda-int4"
    besa.compress(TINY, Recipe.load(recipe).with_exceptions(["*.k_proj"], []), TEXT, out=folder / "dense", **SIZES)
    besa.pack(folder / "dense", folder / "packed")
    return folder / "dense", folder / "packed"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same with every linear of float32."""
    folder = tmp_path_factory.mktemp("plain")
    besa.compress(TINY, "wanda", TEXT, out=folder / "dense", **SIZES)
    besa.pack(folder / "dense", folder / "packed")
    return folder / "dense", folder / "packed"


def logits(model: PreTrainedModel, tokens: int = 24) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(2 * tokens).view(2, -1)).logits


@torch.inference_mode()
def decoded(model: PreTrainedModel) -> torch.Tensor:
    """Logits of a token after ten others; the second of two sequences is shorter, and begins further right."""
    tokens_NT = torch.arange(2 * 11).view(2, -1)
    mask_NT = torch.ones_like(tokens_NT)
    mask_NT[1, :4] = 0
    past = model(tokens_NT[:, :-1], attention_mask=mask_NT[:, :-1], use_cache=True).past_key_values
    return model(tokens_NT[:, -1:], attention_mask=mask_NT, past_key_values=past, use_cache=True).logits


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel that is no product is called from now on."""
    calls: Counter[str] = Counter()

    def count(name: str, usual: Callable[..., torch.Tensor], *given: Any) -> torch.Tensor:
        calls[name] += 1
        return usual(*given)

    for module, name in ((norm, "normed"), (attention, "attend")):
        monkeypatch.setattr(module, name, partial(count, name, getattr(module, name)))
    return calls


def sparse(model: PreTrainedModel) -> dict[str, SparseLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


@pytest.mark.slow
def test_an_accelerator_writes_and_measures_the_same(pair: tuple[Path, Path]) -> None:
    """It is waited for once a token, and once a window, in transformers' own code."""
    for folder in pair:
        model, tokens = besa.load(folder, device=pretend.DEVICE), 20
        assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {pretend.DEVICE}
        pretend.reset()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found = besa.generate(model, PROMPT, tokenizer=tokenizer, max_new_tokens=tokens)
        assert found == besa.generate(folder, PROMPT, max_new_tokens=tokens, device="cpu")
        assert sum(pretend.counts.syncs.values()) <= tokens + 4
        pretend.reset()
        there, here = (
            besa.evaluate(folder, [HELDOUT], window=64, max_windows=20, batch=1, device=device)
            for device in (pretend.DEVICE, "cpu")
        )
        assert there.perplexity["heldout"] == pytest.approx(here.perplexity["heldout"], rel=1e-6)
        assert sum(pretend.counts.syncs.values()) <= 20 + 2


def test_same_logits_tokens_and_perplexity_as_dense(pair: tuple[Path, Path]) -> None:
    dense, packed = (besa.load(folder) for folder in pair)
    assert len(sparse(packed)) == 8 * 6
    assert not sparse(dense)
    torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(packed, 100), logits(dense, 100), rtol=1e-4, atol=1e-4)  # where panels are used
    tokens = torch.randint(1024, (3, 12), generator=torch.Generator().manual_seed(0))
    arguments = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 40, "do_sample": False}
    assert torch.equal(packed.generate(tokens, **arguments), dense.generate(tokens, **arguments))
    assert besa.generate(pair[1], PROMPT, max_new_tokens=30) == besa.generate(pair[0], PROMPT, max_new_tokens=30)
    expected, found = (besa.evaluate(folder, [HELDOUT], window=64, max_windows=8) for folder in pair)
    assert found.perplexity["heldout"] == pytest.approx(expected.perplexity["heldout"], rel=1e-5)
    assert found.sparsity == expected.sparsity


def test_bfloat16_within_its_rounding(pair: tuple[Path, Path]) -> None:
    dense, packed = (besa.load(folder, dtype="bfloat16") for folder in pair)
    assert all(module.bitmask.dtype == torch.bfloat16 for module in sparse(packed).values())
    exact = logits(besa.load(pair[0]))
    errors = [float((logits(model).float() - exact).square().mean()) for model in (packed, dense)]
    assert errors[0] < 2 * errors[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_a_dense_model_gives(plain: tuple[Path, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    """Packed layers compute in their own dtype, so they are nearer to the model without autocast."""
    besa.pack(plain[0], tmp_path / "packed", head="int8")
    dense, packed = besa.load(plain[0]), besa.load(tmp_path / "packed")
    exact = logits(packed)
    with torch.autocast("cpu", dtype):
        rough, found = logits(dense), logits(packed)
    assert found.dtype in (dtype, torch.float32)
    assert 0 < (found - exact).norm() < (rough - logits(dense)).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("recipe", some_slow(["wanda", "wanda-int4"], {"wanda-int4"}))
def test_a_packed_model_can_be_compiled(recipe: str, shallow_llama_folder: Path, tmp_path: Path) -> None:
    """As one graph, in which its products are operators that keep to what torch asks of one."""
    besa.compress(shallow_llama_folder, recipe, TEXT, out=tmp_path / "dense", **SIZES)
    besa.pack(tmp_path / "dense", tmp_path / "packed", head="int8")
    model = besa.load(tmp_path / "packed")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(logits(compiled), logits(model), rtol=1e-5, atol=1e-4)
    x_NI = torch.randn(3, model.config.hidden_size)
    weight, matrix = next(iter(sparse(model).values())).bitmask, model.lm_head.matrix
    tensors = (weight.masks_BCR, weight.values, weight.offsets, weight.scales_OG, weight.zeros_OG)
    operators = torch.ops.besa_runtime
    torch.library.opcheck(operators.sparse_product, (x_NI, *tensors, list(weight.shape), weight.bits))
    torch.library.opcheck(operators.coded_product, (x_NI, matrix.codes_OI, matrix.steps_O1))


def after_a_token(folder: Path) -> PreTrainedModel:
    """A packed model whose products have been made ready for one row of x."""
    model = besa.load(folder)
    decoded(model)
    return model


def check_products(model: PreTrainedModel) -> None:
    """Each product of one row of x is torch's with the weight that plain torch unpacks now."""
    for linear in sparse(model).values():
        x_NI = torch.randn(1, linear.in_features)
        expected_NO = x_NI @ linear.bitmask.unpack().T
        scale = float(expected_NO.abs().max())
        torch.testing.assert_close(linear(x_NI), expected_NO, rtol=0, atol=1e-4 * scale)


def doubled(linear: SparseLinear) -> torch.Tensor:
    """The numbers of a packed linear that double its weight if they are doubled."""
    return linear.weight_values if linear.bits is None else linear.weight_scale


def test_weights_that_move_or_change_are_seen(pair: tuple[Path, Path]) -> None:
    """Torch moves storage in place, as for another process (`share_memory_`), and may get other numbers in place."""
    model = after_a_token(pair[1])
    expected = decoded(model)
    for tensor in model.state_dict().values():
        tensor.share_memory_()
    assert torch.equal(decoded(model), expected)
    check_products(model)
    for linear in sparse(model).values():
        doubled(linear).data = 2 * doubled(linear)
    assert not torch.equal(decoded(model), expected)
    check_products(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_a_program_changes_nothing(
    plain: tuple[Path, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    besa.pack(plain[0], tmp_path / "packed", head="int8")
    for folder in (plain[1], tmp_path / "packed"):
        model = besa.load(folder)
        expected = logits(model), decoded(model)
        torch.set_default_dtype(dtype)
        try:
            found = logits(model), decoded(model)
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(map(torch.equal, found, expected))


def test_a_packed_model_can_be_traced_and_pickled(plain: tuple[Path, Path], tmp_path: Path) -> None:
    model = besa.load(plain[1])
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(decoded(again), decoded(model))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(besa.load(tmp_path / "again")), logits(model))
    linear = next(iter(sparse(model).values()))
    x_NI = torch.randn(2, linear.in_features)
    traced = torch.jit.trace(linear, (x_NI,))
    assert torch.equal(traced(x_NI), linear(x_NI))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(mode.from_tensor(torch.arange(8)[None])).logits.shape == (1, 8, model.config.vocab_size)


def test_tokens_and_widths_that_cannot_be_are_refused(plain: tuple[Path, Path], tmp_path: Path) -> None:
    besa.pack(plain[0], tmp_path / "packed", head="int8")
    model = besa.load(tmp_path / "packed")
    with pytest.raises(IndexError):
        model(torch.tensor([[5, -100, 7]]))
    for rows in (2, 3):
        with pytest.raises(RuntimeError):
            model.lm_head(torch.ones(rows, model.config.hidden_size // rows))


def test_what_cannot_be_saved_is_refused(plain: tuple[Path, Path], tmp_path: Path) -> None:
    model = besa.load(plain[1])
    with pytest.raises(BesaError, match="without a variant"):
        model.save_pretrained(tmp_path / "variant", variant="fp16")
    with pytest.raises(BesaError, match="LlamaModel is a part of a packed model: save the whole"):
        model.model.save_pretrained(tmp_path / "part")
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


def test_weights_stay_in_the_file(plain: tuple[Path, Path]) -> None:
    model = besa.load(plain[1])
    file = str((plain[1] / "bitmask.safetensors").resolve())
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(file)]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    for name, module in sparse(model).items():
        for tensor in (module.bitmask.masks_BCR, module.bitmask.values):
            assert any(begin <= tensor.data_ptr() < end for begin, end in ranges), name


def test_a_saved_packed_model_is_a_packed_checkpoint(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = besa.load(pair[1])
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(besa.load(tmp_path / "saved")), logits(model))


def test_another_dtype_without_autocast_is_refused(plain: tuple[Path, Path], tmp_path: Path) -> None:
    besa.pack(plain[0], tmp_path / "packed", head="int8")
    model = besa.load(tmp_path / "packed")
    for layer in (model.model.layers[0].mlp.up_proj, model.lm_head):
        with pytest.raises(BesaError, match="computes in float32 but got bfloat16: load the model with dtype="):
            layer(torch.zeros(2, 96, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", [MASK, VALUES])
def test_a_part_of_another_weight_is_refused(name: str) -> None:
    """Its masks would have more ones than there are values, so that kernels read beyond the end."""
    generator = torch.Generator().manual_seed(0)
    linear, other = (
        SparseLinear(bitmask.pack(torch.randn(8, 64, generator=generator) * (torch.arange(64) % every == 0)))
        for every in (3, 2)
    )
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    with pytest.raises(BesaError, match="masks and values do not fit"):
        linear.load_state_dict({name: other.state_dict()[name]}, strict=False)
    assert all(map(torch.equal, before.values(), linear.state_dict().values()))


def test_what_a_packed_linear_cannot_do_is_refused(plain: tuple[Path, Path]) -> None:
    model = besa.load(plain[1])
    with pytest.raises(BesaError, match="compute no gradients"):
        model(inputs_embeds=torch.zeros(1, 3, 96, requires_grad=True))
    with torch.no_grad(), pytest.raises(BesaError, match="compute no gradients"):
        jvp(lambda x_NTC: model(inputs_embeds=x_NTC).logits, (torch.zeros(1, 3, 96),), (torch.ones(1, 3, 96),))
    with pytest.raises(BesaError, match="keep their dtype"):
        model.to(torch.float16)
    with pytest.raises(BesaError, match="prompt is empty"):
        besa.generate(plain[1], "")


SIZE = {"vocab_size": 1024, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS = {"num_key_value_heads": 2, "intermediate_size": 96}
STATE = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 1,
    "mamba_dt_rank": 32,
    "use_mamba_kernels": False,
}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 2,
}
# With how many linears of a block are packed, and how many norms and attentions kernels compute in two passes.
FAMILIES: dict[str, tuple[PretrainedConfig, int, int, int]] = {
    "phi3": (Phi3Config(**SIZE, **HEADS, pad_token_id=0), 4, 10, 2),  # one linear for queries, keys and values
    "qwen3": (Qwen3Config(**SIZE, **HEADS, head_dim=16), 7, 18, 2),  # norms of each head
    "deepseek_v3": (DeepseekV3Config(**SIZE, **LATENT), 8, 14, 2),  # values are narrower than keys
    "gemma3": (Gemma3TextConfig(**SIZE, **HEADS, head_dim=16), 7, 22, 2),  # tied, with buffers of its own
    "gpt_neox": (GPTNeoXConfig(**SIZE, intermediate_size=96), 4, 0, 2),  # biases
    "falcon": (FalconConfig(**SIZE), 4, 0, 0),  # a linear and an attention of its own
    "mixtral": (MixtralConfig(**SIZE, **HEADS, num_local_experts=4), 4, 10, 2),  # experts stay dense
    "jamba": (JambaConfig(**SIZE, **HEADS, **STATE), 7, 10, 1),  # reads the weight of a linear, and does not call it
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, linears, norms, attentions = FAMILIES[family]
    dense = halved(config, tmp_path / "dense")
    besa.pack(dense, tmp_path / "packed")
    model = besa.load(tmp_path / "packed")
    assert len(sparse(model)) == 2 * linears
    torch.testing.assert_close(logits(model), logits(besa.load(dense)), rtol=1e-4, atol=1e-4)
    expected, calls = decoded(besa.load(dense)), counted(monkeypatch)
    torch.testing.assert_close(decoded(model), expected, rtol=1e-4, atol=1e-4)
    assert not norm.paths() or (calls["normed"], calls["attend"]) == (norms, attentions)
    found, expected = (inspect(locate(folder)) for folder in (tmp_path / "packed", dense))
    assert found.zeros == expected.zeros
    assert found.bytes < expected.bytes
    besa.unpack(tmp_path / "packed", tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (dense, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.skipif(not norm.paths(), reason="needs a compiler")
def test_a_buffer_that_files_lack_is_no_missing_weight(tmp_path: Path) -> None:
    """Files of older releases lack some, and transformers makes them anew."""
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    latent = LATENT | {"first_k_dense_replace": 1}
    folder = halved(
        DeepseekV3Config(**SIZE, **latent, **experts, intermediate_size=96, moe_intermediate_size=16),
        tmp_path / "dense",
    )
    expected = logits(besa.load(folder))
    tensors = load_file(folder / "model.safetensors")
    assert not tensors.pop("model.layers.1.mlp.gate.e_score_correction_bias").any()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(besa.load(folder)), expected)


def test_kernels_serve_packed_models_until_the_user_wants_something_else(
    plain: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, model = (besa.load(folder) for folder in plain)
    expected, calls = decoded(dense), counted(monkeypatch)
    assert not calls
    blocks = len(model.model.layers)
    for each in (model, copy.deepcopy(model)):
        torch.testing.assert_close(decoded(each), expected, rtol=1e-4, atol=1e-4)
    assert calls == {"attend": 2 * blocks, "normed": 4 * (2 * blocks + 1)}
    model.set_attn_implementation("eager")
    torch.testing.assert_close(decoded(model), expected, rtol=1e-4, atol=1e-4)
    assert calls["attend"] == 2 * blocks
    model.set_attn_implementation("sdpa")
    calls.clear()
    torch.testing.assert_close(decoded(model.dequantize()), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoded(dense), expected)
    assert not calls


def test_transposed_linears_stay_dense(tmp_path: Path) -> None:
    dense = halved(GPT2Config(vocab_size=1024, n_embd=64, n_layer=2, n_head=4), tmp_path / "dense")
    with pytest.raises(BesaError, match="no linear would get smaller"):
        besa.pack(dense, tmp_path / "packed")


def test_a_step_reads_all_but_the_embeddings(plain: tuple[Path, Path]) -> None:
    dense, packed = (besa.load(folder) for folder in plain)
    inside = sum(parameter.nbytes for parameter in dense.model.layers.parameters()) + dense.model.norm.weight.nbytes
    head = dense.lm_head.weight.nbytes
    buffers = sum(buffer.nbytes for buffer in dense.buffers())
    assert speed.step_bytes(dense) == inside + head + buffers
    found = inspect(locate(plain[1]))
    assert speed.step_bytes(packed) == speed.step_bytes(dense) - inspect(locate(plain[0])).bytes + found.bytes
    dense.lm_head.weight = nn.Parameter(dense.model.embed_tokens.weight.clone(), requires_grad=False)  # no longer tied
    assert speed.step_bytes(dense) == inside + head + buffers


def timing(work: str, seconds: float) -> Timing:
    return Timing(work=work, tokens=8, seconds=seconds, low=seconds, high=seconds, limit=seconds / 2)


def test_others_are_compared_with_the_fastest_form_of_the_first_model() -> None:
    about = {"dtype": "float32", "file_bytes": 1, "resident_bytes": None, "step_bytes": 1}
    models = [
        ModelSpeed(model=model, form=form, timings=[timing("decode 1", seconds)], **about)
        for model, form, seconds in [("a", "dense", 4.0), ("a", "dense, prepacked", 2.0), ("b", "sparse", 1.0)]
    ]
    facts = {"bandwidth": 1.0, "rounds": 1, "created": "", "versions": {}, "machine": {}}
    assert [ratio for _, _, ratio in Bench(models=models, **facts).of("decode 1")] == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("slow", [True, False])
def test_the_fastest_dense_form_computes_the_same(
    plain: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    """In float32 products where the processor has no units for bfloat16, else in oneDNN's layout, if it has one."""
    monkeypatch.setattr(widening, "slow", lambda: frozenset([torch.bfloat16] * slow))
    model, tokens = besa.load(plain[0], dtype="bfloat16"), torch.arange(40)[None]
    found = fastest(model)
    if found is None:  # as bfloat16 in oneDNN's layout is on processors without units for it
        assert not slow
        return
    form, other = found
    assert form == (timings.WIDENED if slow else timings.PREPACKED)
    kind = WidenedLinear if slow else PrepackedLinear
    assert sum(type(module) is kind for module in other.modules()) == 8 * 7 + 1
    with torch.no_grad():
        torch.testing.assert_close(other(tokens).logits, model(tokens).logits, rtol=0.02, atol=0.05)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less work than users measure."""
    works = [speed._Work("decode 4", 4, 8, 2), speed._Work("prefill 64", tokens=64), speed._Work("first token")]
    monkeypatch.setattr(speed, "WORKS", works)
    monkeypatch.setattr(speed, "READ", 1 << 20)


def besa_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["besa", *map(str, arguments)])
    cli.main()


@pytest.mark.usefixtures("short")
def test_bench_leaves_out_what_has_too_few_positions(tmp_path: Path) -> None:
    size = {"vocab_size": 1024, "n_embd": 32, "n_layer": 1, "n_head": 2}
    for positions in (48, 8):
        GPT2LMHeadModel(GPT2Config(**size, n_positions=positions)).save_pretrained(tmp_path / str(positions))
        AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / str(positions))
    found = besa.bench([tmp_path / "48"], rounds=1, device="cpu")
    assert found.works() == ["decode 4", "first token"]
    with pytest.raises(BesaError, match="has 8 positions, too few"):
        besa.bench([tmp_path / "8"], rounds=1, device="cpu")


@pytest.mark.usefixtures("short")
def test_bench(
    plain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(plain[0].parent)
    besa_command(monkeypatch, "bench", "dense", "packed", "--rounds", "2", "--json", tmp_path / "besa_bench.json")
    found = Bench.model_validate_json((tmp_path / "besa_bench.json").read_text())
    forms = [(model.model, model.form) for model in found.models]
    assert forms[0] == ("dense", "dense")
    assert forms[-1] == ("packed", "sparse")
    assert found.works() == ["decode 4", "prefill 64", "first token"]
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in plain]
    assert [model.file_bytes for model in (found.models[0], found.models[-1])] == sizes
    for model in found.models:
        assert [timing.tokens for timing in model.timings] == [8, 64, 8]
        for timing, passes in zip(model.timings, (2, 1, 1), strict=True):
            assert 0 < timing.low <= timing.seconds <= timing.high
            assert timing.limit == pytest.approx(passes * model.step_bytes / found.bandwidth)
    for work in found.works():
        ratios = [ratio for model, _, ratio in found.of(work) if model.model == "dense"]
        assert math.isclose(max(ratios), 1)
    said = capsys.readouterr().out
    assert "prefill 64" in said
    assert "of limit" in said


@pytest.mark.usefixtures("short")
def test_a_model_named_twice_is_refused(plain: tuple[Path, Path]) -> None:
    with pytest.raises(BesaError, match="named twice"):
        besa.bench([plain[0], plain[0]])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": math.nan}, "no temperature nan"),
        ({"temperature": -0.1}, "no temperature -0.1"),
        ({"seed": 2**32}, "no seed 4294967296"),
        ({"max_new_tokens": 0}, "max_new_tokens should be greater than or equal to 1"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_the_model_is_read(given: dict[str, float], words: str) -> None:
    with pytest.raises(BesaError, match=words):
        besa.generate("none", PROMPT, **given)


def test_temperatures_from_none_to_all_but_infinite(plain: tuple[Path, Path]) -> None:
    """The least is the likeliest token each time, the largest takes any of those that are looked at."""
    coldest, cold, hot, hottest = (
        besa.generate(plain[0], PROMPT, max_new_tokens=12, temperature=temperature, seed=1)
        for temperature in (0.0, 5e-324, 1e10, 1.7e308)
    )
    assert cold == coldest
    assert hot == hottest != cold


def test_a_text_ends_where_the_positions_do(plain: tuple[Path, Path]) -> None:
    model, tokenizer = besa.load(plain[0]), AutoTokenizer.from_pretrained(plain[0])
    model.config.max_position_embeddings = len(tokenizer(PROMPT)["input_ids"]) + 3
    model.generation_config.eos_token_id = None
    made = besa.generate(model, PROMPT, max_new_tokens=10**12, tokenizer=tokenizer)
    assert made == besa.generate(plain[0], PROMPT, max_new_tokens=3)
    model.config.max_position_embeddings -= 3
    with pytest.raises(BesaError, match="so the model has no position left"):
        besa.generate(model, PROMPT, tokenizer=tokenizer)


def test_commands(
    plain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    besa_command(monkeypatch, "pack", plain[0], tmp_path / "packed")
    assert "56 of 56 linears packed" in capsys.readouterr().out
    besa_command(monkeypatch, "inspect", tmp_path / "packed", "--json", tmp_path / "inspect.json")
    assert "masks 1.000, values 16.0" in capsys.readouterr().out
    assert json.loads((tmp_path / "inspect.json").read_text())["bits_per_weight"] < 17.5
    besa_command(monkeypatch, "unpack", tmp_path / "packed", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (plain[0] / "model.safetensors").read_bytes()
    for extra in ([], ["--temperature", "0.8", "--seed", "3"]):
        capsys.readouterr()
        arguments = ["--prompt", PROMPT, "--max-new-tokens", "20", *extra]
        besa_command(monkeypatch, "generate", tmp_path / "packed", *arguments)
        streamed = capsys.readouterr().out
        besa_command(monkeypatch, "generate", plain[0], *arguments)
        assert streamed == capsys.readouterr().out
        assert len(streamed.split()) > 3
