"""Models that the caller has loaded, in whatever state a program leaves them and torch in."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from shutil import copytree

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import besa
from tests.slowly import some_slow

SMALL = LlamaConfig(vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
SIZES = {"samples": 4, "seqlen": 16}


@pytest.fixture(scope="module")
def text(tiny_llama_folder: Path) -> str:
    return str(tiny_llama_folder / "calibration.txt")


def small() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(SMALL).requires_grad_(True)


def pruned(model: PreTrainedModel, recipe: str, text: str, tokenizer) -> dict[str, torch.Tensor]:
    besa.compress(model, recipe, text, tokenizer=tokenizer, **SIZES)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def coarse() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")  # bfloat16 on a CPU that has units for it, TF32 on a GPU
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


STATES = [
    torch.no_grad,
    torch.inference_mode,
    lambda: default(torch.bfloat16),
    lambda: default(torch.float64),
    lambda: torch.autocast("cpu", torch.bfloat16),
    lambda: torch.device("meta"),
    coarse,
]


@pytest.mark.parametrize("recipe", some_slow(["besa", "fast"], {"fast"}))
@pytest.mark.parametrize("state", STATES)
def test_switches_of_the_program_change_nothing(
    state: Callable[[], AbstractContextManager[None]], recipe: str, text: str, tiny_tokenizer
) -> None:
    expected, model = pruned(small(), recipe, text, tiny_tokenizer), small()
    with state():
        found = pruned(model, recipe, text, tiny_tokenizer)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("state", some_slow(STATES, {torch.no_grad, *STATES[2:4]}))
def test_switches_of_the_program_do_not_change_what_is_measured(
    state: Callable[[], AbstractContextManager[None]], text: str, tiny_tokenizer
) -> None:
    def measured(model: PreTrainedModel) -> dict[str, float]:
        return besa.evaluate(model, [text], window=64, max_windows=4, tokenizer=tiny_tokenizer).perplexity

    model = small()
    expected = measured(model)
    with state():
        assert measured(model) == expected


def test_a_model_of_inference_mode(text: str, tiny_tokenizer) -> None:
    """It can be measured; its weights cannot take part in learning."""
    with torch.inference_mode():
        model = small()
    besa.evaluate(model, [text], window=64, max_windows=1, tokenizer=tiny_tokenizer)
    assert all(weight.requires_grad for weight in model.parameters())
    with pytest.raises(besa.BesaError, match=r"embed_tokens\.weight of LlamaForCausalLM was made in inference mode"):
        besa.compress(model, "wanda", text, tokenizer=tiny_tokenizer, **SIZES)


def test_a_model_that_was_being_trained(text: str, tiny_tokenizer) -> None:
    """A hook of transformers makes its embeddings require gradients."""
    model = small()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    expected = pruned(small(), "besa", text, tiny_tokenizer)
    found = pruned(model, "besa", text, tiny_tokenizer)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("before", "after"), some_slow([("float32", "bfloat16"), ("bfloat16", "float32")], {("float32", "bfloat16")})
)
def test_config_says_the_dtype_of_the_weights(
    before: str, after: str, text: str, tiny_tokenizer, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=before).to(getattr(torch, after))
    besa.compress(model, "wanda", text, out=tmp_path / "out", tokenizer=tiny_tokenizer, **SIZES)
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == getattr(torch, after)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, after)


def test_another_dtype_than_its_own_is_refused(text: str, tiny_tokenizer) -> None:
    for dtype in ("auto", "float32"):
        besa.compress(small(), "wanda", text, tokenizer=tiny_tokenizer, dtype=dtype, **SIZES)
    with pytest.raises(besa.BesaError, match="LlamaForCausalLM is loaded in float32: load it in bfloat16, or leave"):
        besa.compress(small(), "wanda", text, tokenizer=tiny_tokenizer, dtype="bfloat16", **SIZES)
    with pytest.raises(besa.BesaError, match="LlamaForCausalLM is loaded in float32: load it in float16, or leave"):
        besa.evaluate(small(), ["wiki"], tokenizer=tiny_tokenizer, dtype="float16")
    with pytest.raises(besa.BesaError, match="LlamaForCausalLM is loaded in float32: load it in bfloat16, or leave"):
        besa.generate(small(), "The", tokenizer=tiny_tokenizer, dtype="bfloat16")


@pytest.mark.slow
def test_flex_attention_is_refused_with_what_to_do(text: str, tiny_tokenizer) -> None:
    model = LlamaForCausalLM(copy.deepcopy(SMALL))
    model.set_attn_implementation("flex_attention")
    with pytest.raises(besa.BesaError, match=r"flex attention, use model\.set_attn_implementation\('sdpa'\)\.$"):
        besa.compress(model, "wanda", text, samples=2, seqlen=16, tokenizer=tiny_tokenizer)


def with_bias(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.up_proj.bias = torch.nn.Parameter(torch.ones(model.config.intermediate_size))


def narrowed(model: PreTrainedModel) -> None:
    mlp = model.model.layers[0].mlp
    mlp.gate_proj.weight, mlp.up_proj.weight = (
        torch.nn.Parameter(linear.weight[:8].detach()) for linear in (mlp.gate_proj, mlp.up_proj)
    )
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, :8].detach())


def without_norm(model: PreTrainedModel) -> None:
    model.model.norm = torch.nn.Identity()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_bias, "model.layers.1.mlp.up_proj.bias of LlamaForCausalLM is of shape .*, but not there by its config"),
        (narrowed, "model.layers.0.mlp.down_proj.weight of .* is of shape .*, but of shape .* by its config"),
        (without_norm, "model.norm.weight of LlamaForCausalLM is not there, but of shape .* by its config"),
    ],
)
def test_a_model_that_no_folder_gives_back_is_pruned_in_memory_alone(
    change: Callable[[PreTrainedModel], None], words: str, text: str, tiny_tokenizer, tmp_path: Path
) -> None:
    model = small()
    change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(besa.BesaError, match=words):
        besa.compress(model, "wanda", text, out=tmp_path / "out", tokenizer=tiny_tokenizer, **SIZES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not list(tmp_path.iterdir())
    assert besa.compress(model, "wanda", text, tokenizer=tiny_tokenizer, **SIZES).record.zeros > 0


def test_weights_without_memory_are_refused(text: str, tiny_tokenizer) -> None:
    refused = "model.embed_tokens.weight of LlamaForCausalLM has no memory"
    with pytest.raises(besa.BesaError, match=refused):
        besa.evaluate(small().to("meta"), [text], window=64, max_windows=1, tokenizer=tiny_tokenizer)
    with pytest.raises(besa.BesaError, match=refused):
        besa.generate(small().to("meta"), "The", tokenizer=tiny_tokenizer)


def test_weights_that_are_brought_for_each_call_serve(text: str, tiny_tokenizer) -> None:
    def used(model: PreTrainedModel) -> tuple[str, dict[str, float]]:
        said = besa.generate(model, "The", tokenizer=tiny_tokenizer, max_new_tokens=8)
        return said, besa.evaluate(model, [text], window=64, max_windows=1, tokenizer=tiny_tokenizer).perplexity

    offloaded = small()
    cpu_offload(offloaded.lm_head, torch.device("cpu"))
    assert offloaded.lm_head.weight.is_meta
    assert used(offloaded) == used(small())


def test_devices_that_are_not_there_are_refused(tiny_tokenizer) -> None:
    with pytest.raises(besa.BesaError, match="There is no device nonsense"):
        besa.generate(small(), "The", tokenizer=tiny_tokenizer, device="nonsense")
    with pytest.raises(besa.BesaError, match="There is no XPU device that torch can use here"):
        besa.generate(small(), "The", tokenizer=tiny_tokenizer, device="xpu")


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_text_of_outputs_that_are_not_finite_is_refused(value: float, temperature: float, tiny_tokenizer) -> None:
    model = small()
    model.model.norm.weight.data[3] = value
    with pytest.raises(besa.BesaError, match=r"^The model's output is NaN or infinite: try --dtype float32, or check"):
        besa.generate(model, "The", tokenizer=tiny_tokenizer, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_single_tokens_may_be_ruled_out(temperature: float, tiny_tokenizer) -> None:
    """As by a model that gives the rows that pad its vocabulary no probability."""

    def said(low: float) -> str:
        model, padding = small(), torch.arange(1000, 1024)
        model.lm_head.register_forward_hook(lambda module, inputs, logits: logits.index_fill(-1, padding, low))
        return besa.generate(model, "The", tokenizer=tiny_tokenizer, temperature=temperature, max_new_tokens=8)

    assert said(-torch.inf) == said(-1e4)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_random_numbers_of_the_program_go_on(
    temperature: float, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the CPU, and those of devices that the model is not on."""
    model, before = small(), torch.get_rng_state()
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    for seed in (1, 2, 1):
        besa.generate(model, "The", tokenizer=tiny_tokenizer, temperature=temperature, seed=seed, max_new_tokens=8)
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []


def test_an_adapter_is_refused(text: str, tiny_tokenizer, tiny_llama_folder: Path, tmp_path: Path) -> None:
    """Its factors would be pruned one by one, or it would be left out without a word."""
    peft = pytest.importorskip("peft")
    model = small()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(besa.BesaError, match="LlamaForCausalLM has an adapter: merge it"):
        besa.compress(model, "wanda", text, tokenizer=tiny_tokenizer, **SIZES)
    folder = copytree(tiny_llama_folder, tmp_path / "folder")
    (folder / "adapter_config.json").write_text("{}")
    calls = (lambda: besa.compress(folder, "wanda", text, out=tmp_path / "out", **SIZES), lambda: besa.load(folder))
    for use in calls:
        with pytest.raises(besa.BesaError, match="holds an adapter too: merge it into the weights, or"):
            use()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", some_slow(["codes", "packed"], {"packed"}))
def test_what_was_packed_or_quantised_is_refused(
    form: str, text: str, tiny_tokenizer, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    besa.compress(tiny_llama_folder, "wanda-int4", text, out=tmp_path / "codes", **SIZES)
    besa.pack(tmp_path / "codes", tmp_path / "packed")
    with pytest.raises(besa.BesaError, match="was loaded from packed or quantised weights: prune the model that they"):
        besa.compress(besa.load(tmp_path / form), "wanda", text, tokenizer=tiny_tokenizer, **SIZES)


@pytest.mark.parametrize("recipe", ["wanda", "magnitude"])
def test_outputs_too_large_to_be_compared_are_refused(recipe: str, text: str, tiny_tokenizer) -> None:
    model = small()
    model.model.layers[0].mlp.up_proj.weight.data *= 1e26
    with pytest.raises(besa.BesaError, match=r"The outputs of model\.layers\.0 are too large to be compared"):
        besa.compress(model, recipe, text, tokenizer=tiny_tokenizer, **SIZES)


@pytest.mark.parametrize("sign", [1, -1])
def test_gradients_that_are_not_finite_are_refused(sign: int, text: str, tiny_tokenizer) -> None:
    model = small()
    model.model.norm.weight.data[3] = sign * float("nan")
    with pytest.raises(besa.BesaError, match=r"The gradients of the loss at model.layers.1 have NaN or infinity"):
        besa.compress(model, "fast", text, tokenizer=tiny_tokenizer, **SIZES)
