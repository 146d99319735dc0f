"""Attention modules and blocks of packed models as one call for a token: which are, and that nothing else differs."""

import copy
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    CohereConfig,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from besa import BesaError
from besa.kernels import decoding as kernels
from besa.runtime import block_decoding, decoding, growing, norms
from besa.runtime.growing import MORE
from besa.runtime.linear import SparseLinear
from tests.decoded import SIZE, counted, packed, same, steps, usual

pytestmark = pytest.mark.skipif(not kernels.serves(torch.float32), reason="needs a compiler")
PAD = {"pad_token_id": 0}
WIDE = "olmo2"  # turns heads in float32, whatever the dtype
FAMILIES: dict[str, tuple[PretrainedConfig, int]] = {  # and the blocks whose attention is one call
    "llama": (LlamaConfig(**SIZE), 4),
    "qwen2": (Qwen2Config(**SIZE), 4),  # biases
    "starcoder2": (Starcoder2Config(**SIZE), 4),  # biases, of the output too
    "qwen3": (Qwen3Config(**SIZE, head_dim=24), 4),  # norms of each head, which are not as wide as the block together
    WIDE: (Olmo2Config(**SIZE), 4),  # norms of all heads
    "stablelm": (StableLmConfig(**SIZE), 4),  # a quarter of each head is turned
    "smollm3": (SmolLM3Config(**SIZE, **PAD, no_rope_layers=[1, 0, 1, 1]), 3),  # a block without positions
    "gemma3": (Gemma3TextConfig(**SIZE, head_dim=16, sliding_window=8, sliding_window_pattern=2), 2),  # others slide
    "olmo": (OlmoConfig(**SIZE, **PAD, clip_qkv=8.0), 0),  # clips queries, keys and values
    "mistral": (MistralConfig(**SIZE, sliding_window=8), 0),
    "cohere": (CohereConfig(**SIZE), 0),  # turns neighbouring numbers
    "phi3": (Phi3Config(**SIZE, **PAD), 0),  # one linear for queries, keys and values
}

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 0.03}  # what norms by besa's kernel may differ from the family's by
FOLLOWING = {  # of families whose blocks of bfloat16 are calls, how many each call does
    "llama": [4],
    "qwen2": [4],
    "qwen3": [4],
    "smollm3": [1, 2],
    "gemma3": [1, 1],
}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> PreTrainedModel:
    return packed(LlamaConfig(**SIZE), tmp_path_factory.mktemp("llama"), request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, blocks = FAMILIES[family]
    model = packed(config, tmp_path, dtype)
    expected = steps(usual(model), 12)
    with counted(monkeypatch) as calls:
        assert same(steps(model, 12), expected)
    if family == WIDE and dtype == torch.bfloat16:
        assert not calls
    elif dtype == torch.bfloat16 and family in FOLLOWING:  # the first token shows which block follows another
        assert calls == [1] * blocks + FOLLOWING[family] * 10
    else:
        assert calls == [1] * blocks * 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [family for family, (_, blocks) in FAMILIES.items() if blocks])
def test_the_dense_model_of_transformers_says_the_same(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Nothing of besa's computes in it. In bfloat16, both are as near to it in float32 as rounding lets them be."""
    model = packed(FAMILIES[family][0], tmp_path, dtype)
    exact = tokens_given(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="float32"))
    found = tokens_given(model)
    if dtype == torch.float32:
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    else:
        dense = tokens_given(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
        assert (found - exact).norm() < 1.25 * (dense - exact).norm() < 0.1 * exact.norm()


@torch.inference_mode()
def tokens_given(model: PreTrainedModel) -> Tensor:
    """Logits of given tokens, one after the other, in float32."""
    past = DynamicCache(config=model.config)
    return torch.cat([model(torch.tensor([[token]]), past_key_values=past).logits.float() for token in range(5, 17)])


def test_a_cache_grows_in_place_for_longer_than_its_room(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    larger, made = growing._larger, []
    monkeypatch.setattr(growing, "_larger", lambda part: made.append(part) or larger(part))
    assert same(steps(model, MORE + 3), steps(usual(model), MORE + 3))
    assert len(made) == 2 * 2 * SIZE["num_hidden_layers"]


def test_whatever_else_happens_to_a_cache(model: PreTrainedModel) -> None:
    """It is copied, cut, repeated, pickled and continued; each goes on as it would have."""

    def grown(model: PreTrainedModel) -> DynamicCache:
        past = DynamicCache(config=model.config)
        steps(model, 4, past_key_values=past)
        return past

    def cut(past: DynamicCache) -> DynamicCache:
        past.crop(-2)
        return past

    def repeated(past: DynamicCache) -> DynamicCache:
        past.batch_repeat_interleave(2)
        past.batch_select_indices(torch.tensor([1]))
        return past

    def shared(past: DynamicCache) -> DynamicCache:
        """Another cache of the same tensors, whose own first goes on with another token."""
        other = copy.copy(past)
        other.layers = [copy.copy(layer) for layer in past.layers]
        with torch.inference_mode():
            model(torch.tensor([[7]]), past_key_values=past)
        return other

    other = usual(model)
    for change in (cut, repeated, shared, copy.deepcopy, lambda past: pickle.loads(pickle.dumps(past))):
        expected, found = change(grown(other)), change(grown(model))
        assert same(steps(model, 3, past_key_values=found), steps(other, 3, past_key_values=expected))
    with torch.no_grad():  # after steps in inference mode
        past, plain = grown(model), grown(other)
        for _ in range(3):
            found = model(torch.tensor([[3]]), past_key_values=past).logits
            assert torch.equal(found, other(torch.tensor([[3]]), past_key_values=plain).logits)


def test_what_is_no_step_of_one_sequence_goes_the_usual_way(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = usual(model)

    def static(model: PreTrainedModel) -> list[Tensor]:
        return steps(model, 4, past_key_values=StaticCache(config=model.config, max_cache_len=16))

    with counted(monkeypatch) as calls:
        assert same(steps(model, 4, sequences=2), steps(other, 4, sequences=2))
        assert same(static(model), static(other))
        ends = torch.tensor([0, 1])
        assert same(steps(model, 4, cu_seq_lens_q=ends), steps(other, 4, cu_seq_lens_q=ends))
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(torch.tensor([[1]])).logits, other(torch.tensor([[1]])).logits)
        with torch.enable_grad():
            past = DynamicCache(config=model.config)
            model(torch.arange(4).view(1, 4), past_key_values=past)
            model(torch.tensor([[1]]), past_key_values=past)
        copied = copy.deepcopy(model)
        copied.set_attn_implementation("eager")
        assert not calls
        steps(copied, 4)
    assert not calls


def test_what_does_not_fit_is_refused_as_the_family_does(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of another model, or an input of another width: nothing is read or written beyond its end."""
    x, dtype = torch.ones(1, 1, 64, dtype=model.dtype), model.dtype
    angles = torch.ones(1, 1, 16, dtype=dtype), torch.zeros(1, 1, 16, dtype=dtype)
    attends = model.model.layers[0].self_attn

    def call(x: Tensor, heads: int, width: int) -> None:
        past = DynamicCache()
        past.update(*torch.ones(2, 1, heads, 3, width, dtype=dtype), 0)
        with torch.inference_mode():
            attends(hidden_states=x, position_embeddings=angles, attention_mask=None, past_key_values=past)

    with counted(monkeypatch) as calls:
        call(x, 2, 16)
        assert sum(calls) == 1
        for given in ((x, 1, 16), (x, 2, 8), (x[..., :32], 2, 16)):
            with pytest.raises(RuntimeError):
                call(*given)
        assert sum(calls) == 1


def test_what_hangs_on_a_part_is_called(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    each, seen = copy.deepcopy(model), []
    handle = each.model.layers[1].self_attn.k_proj.register_forward_hook(lambda *given: seen.append(given))
    with counted(monkeypatch) as calls:
        steps(each, 4)
        assert (len(seen), sum(calls)) == (4, 3 * 3)
        handle.remove()
        steps(each, 2)
        assert (len(seen), sum(calls)) == (4, 3 * 3 + 4)


def test_weights_that_change_are_met(model: PreTrainedModel, tmp_path: Path) -> None:
    each = copy.deepcopy(model)
    before = steps(each, 3)
    other = packed(LlamaConfig(**SIZE, initializer_range=0.05), tmp_path, model.dtype)
    each.load_state_dict(other.state_dict())
    found = steps(each, 3)
    assert same(found, steps(usual(other), 3)) and not same(found, before)
    assert same(steps(pickle.loads(pickle.dumps(each)), 3), found)
    assert same(steps(model, 3), before)
    each.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    assert same(steps(each, 3), before)


def in_shared_memory(*tensors: Tensor) -> None:
    """Move the memory of tensors, which stay the same objects, as torch does where it sends them to another process."""
    for tensor in tensors:
        before = tensor.data_ptr()
        tensor.share_memory_()
        assert tensor.data_ptr() != before


def cached(past: DynamicCache) -> list[Tensor]:
    return [part for layer in past.layers for part in (layer.keys, layer.values)]


def shared_cache(_: PreTrainedModel, past: DynamicCache) -> None:
    in_shared_memory(*cached(past))


def shared_model(model: PreTrainedModel, _: DynamicCache) -> None:
    in_shared_memory(*model.state_dict().values())


def sent_cache(_: PreTrainedModel, past: DynamicCache) -> None:
    ForkingPickler.dumps(past)


def sent_model(model: PreTrainedModel, _: DynamicCache) -> None:
    ForkingPickler.dumps(model)


@pytest.mark.parametrize("move", [shared_cache, sent_cache, shared_model, sent_model])
@torch.inference_mode()
def test_memory_that_moves_between_two_tokens_is_met(
    model: PreTrainedModel, move: Callable[[PreTrainedModel, DynamicCache], None]
) -> None:
    """Numbers that change where it is now count, so nothing is read or written where it was."""
    each = copy.deepcopy(model)
    past = DynamicCache(config=each.config)
    tokens = [torch.arange(5)[None], *torch.tensor([7, 8, 9, 10]).view(-1, 1, 1)]
    for token in tokens[:3]:
        each(token, past_key_values=past)
    move(each, past)
    for layer in past.layers:
        layer.values.mul_(-1)
    for module in each.modules():
        if isinstance(module, SparseLinear):
            module.weight_values.mul_(-1)
    before = copy.deepcopy(past)
    found = [each(token, past_key_values=past).logits for token in tokens[3:]] + cached(past)
    other = usual(each)
    assert same(found, [other(token, past_key_values=before).logits for token in tokens[3:]] + cached(before))


def other_scaling(model: PreTrainedModel) -> None:
    for block in model.model.layers:
        block.self_attn.scaling *= 50


def other_epsilons(model: PreTrainedModel) -> None:
    for norm in (model.model.norm, *(block.input_layernorm for block in model.model.layers)):
        norm.variance_epsilon = 0.5


def strided_weights(model: PreTrainedModel) -> None:
    for norm in (model.model.norm, *(block.input_layernorm for block in model.model.layers)):
        norm.weight = torch.nn.Parameter(torch.stack([norm.weight * 2, norm.weight], 1)[:, 0], requires_grad=False)


@pytest.mark.parametrize("change", [other_scaling, other_epsilons, strided_weights])
def test_whatever_else_a_module_computes_by_is_met(
    model: PreTrainedModel, change: Callable[[PreTrainedModel], None]
) -> None:
    """As in the same layers without besa's kernels, within the rounding of those."""
    each = copy.deepcopy(model)
    before = steps(each, 3)
    changed = [copy.deepcopy(model), each]
    for one in changed:
        change(one)
    norms.restore(changed[0])
    decoding.restore(changed[0])
    block_decoding.restore(changed[0])
    found, expected = steps(each, 3), steps(changed[0], 3)
    close = CLOSE[model.dtype]
    torch.testing.assert_close(found, expected, rtol=close, atol=close)
    assert not torch.allclose(found[1], before[1], rtol=close, atol=close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tangents_of_a_token_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    """The single call of attention, or of all blocks, would drop them."""
    model = packed(FAMILIES["qwen2"][0], tmp_path, dtype)
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        for tokens in ([[1, 2, 3]], [[4]], [[5]]):  # after two single ones, blocks that follow each other are known
            model(torch.tensor(tokens), past_key_values=past)
    x_NTC = model.get_input_embeddings()(torch.tensor([[6]])).detach()
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(BesaError, match="compute no gradients"):
        model(inputs_embeds=forward_ad.make_dual(x_NTC, torch.ones_like(x_NTC)), past_key_values=past)


def test_strided_biases_are_met(tmp_path: Path) -> None:
    each = packed(FAMILIES["qwen2"][0], tmp_path, torch.float32)
    other = usual(each)
    before = steps(each, 3)
    for one in (each, other):
        for block in one.model.layers:
            numbers = torch.stack([torch.ones(64), torch.zeros(64)], 1)
            block.self_attn.q_proj.bias = torch.nn.Parameter(numbers[:, 0], requires_grad=False)
    found = steps(each, 3)
    assert same(found, steps(other, 3)) and not same(found, before)


@pytest.mark.parametrize("kind", [LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaDecoderLayer])
def test_the_function_of_a_class_may_be_replaced(
    kind: type, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    each, close = copy.deepcopy(model), CLOSE[model.dtype]
    before = steps(each, 3)
    with monkeypatch.context() as patch:
        calls: list[object] = []
        usual = kind.forward

        def forward(self: Any, *given: Any, **named: Any) -> Any:
            calls.append(self)
            return usual(self, *given, **named)

        patch.setattr(kind, "forward", forward)
        torch.testing.assert_close(steps(each, 3), before, rtol=close, atol=close)
        assert len(calls) == 3 * sum(isinstance(module, kind) for module in each.modules())
    with counted(monkeypatch) as again:
        assert same(steps(each, 3), before)
    assert sum(again) == 2 * SIZE["num_hidden_layers"]


def test_an_attention_of_the_user_is_kept(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it comes before the model or after it."""
    calls: list[object] = []

    def own(module: torch.nn.Module, *given: Any, **named: Any) -> Any:
        calls.append(module)
        return sdpa_attention_forward(module, *given, **named)

    each = copy.deepcopy(model)
    with monkeypatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, "sdpa", own)
        steps(each, 3)
        assert len(calls) == 3 * SIZE["num_hidden_layers"]
        later = packed(LlamaConfig(**SIZE), tmp_path, model.dtype)
        calls.clear()
        steps(later, 3)
        assert len(calls) == 3 * SIZE["num_hidden_layers"]
    with counted(monkeypatch) as again:
        steps(each, 3)
    assert sum(again) == 2 * SIZE["num_hidden_layers"]


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_may_change(model: PreTrainedModel, threads: int) -> None:
    before = torch.get_num_threads()
    steps(model, 2)
    torch.set_num_threads(threads)
    try:
        assert same(steps(model, 3), steps(usual(model), 3))
    finally:
        torch.set_num_threads(before)


def test_a_mask_is_kept_to(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first tokens of a prompt that is padded do not count."""

    @torch.inference_mode()
    def last(model: PreTrainedModel) -> Tensor:
        past, mask = DynamicCache(config=model.config), torch.tensor([[0, 0, 1, 1, 1, 1]])
        model(torch.tensor([[0, 0, 5, 6, 7]]), attention_mask=mask[:, :-1], past_key_values=past)
        return model(torch.tensor([[8]]), attention_mask=mask, past_key_values=past).logits

    expected = last(usual(model))
    with counted(monkeypatch) as calls:
        assert torch.equal(last(model), expected)
    assert sum(calls) == SIZE["num_hidden_layers"]
