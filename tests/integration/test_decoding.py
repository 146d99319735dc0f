"""Attention modules and blocks of packed models as one call for a token: which are, and that nothing else differs."""

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
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

import besa
from besa.kernels import decoding as kernels
from besa.kernels.norm import FORMS
from besa.runtime import block_decoding, decoding, growing
from besa.runtime.growing import MORE
from tests.halved_models import halved

pytestmark = pytest.mark.skipif(not kernels.serves(torch.float32), reason="needs a compiler")
SIZE = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
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
    "mistral": (MistralConfig(**SIZE, sliding_window=8), 0),
    "cohere": (CohereConfig(**SIZE), 0),  # turns neighbouring numbers
    "phi3": (Phi3Config(**SIZE, **PAD), 0),  # one linear for queries, keys and values
}

FOLLOWING = {  # of families whose blocks of bfloat16 are calls, how many each call does
    "llama": [4],
    "qwen2": [4],
    "qwen3": [4],
    "smollm3": [1, 2],
    "gemma3": [1, 1],
}


def packed(config: PretrainedConfig, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    besa.pack(halved(config, folder / "dense", dtype), folder / "packed")
    return besa.load(folder / "packed")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> PreTrainedModel:
    return packed(LlamaConfig(**SIZE), tmp_path_factory.mktemp("llama"), request.param)


@pytest.fixture
def halves(tmp_path: Path) -> PreTrainedModel:
    """Whose blocks are one call."""
    return packed(LlamaConfig(**SIZE), tmp_path, torch.bfloat16)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many attention modules each call of a kernel does meanwhile, alone or in their blocks."""
    calls: list[int] = []

    def alone(self: kernels.Step, *given: Any, of: Callable[..., Tensor] = kernels.Step.__call__) -> Tensor:
        calls.append(1)
        return of(self, *given)

    def blocks(steps: list[kernels.Block], *given: Any, of: Callable[..., Tensor] = kernels.passed) -> Tensor:
        calls.append(len(steps))
        return of(steps, *given)

    with monkeypatch.context() as patch:
        patch.setattr(kernels.Step, "__call__", alone)
        patch.setattr(block_decoding, "passed", blocks)
        yield calls


def usual(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that attends as its family does."""
    other = copy.deepcopy(model)
    decoding.restore(other)
    block_decoding.restore(other)
    assert not any("forward" in vars(block.self_attn) for block in other.model.layers)
    return other


@torch.inference_mode()
def steps(model: PreTrainedModel, count: int, sequences: int = 1, **options: Any) -> list[Tensor]:
    """Logits of so many tokens, one after the other, after a prompt; and keys and values of all."""
    past = options.pop("past_key_values", None) or DynamicCache(config=model.config)
    tokens = torch.arange(5 * sequences).view(sequences, 5)
    found = []
    for _ in range(count):
        out = model(tokens, past_key_values=past, **options)
        found.append(out.logits[:, -1])
        tokens = out.logits[:, -1:].argmax(-1)
    return found + [part for layer in past.layers for part in (layer.keys, layer.values)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


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


@pytest.mark.parametrize("family", [family for family, (_, blocks) in FAMILIES.items() if blocks])
def test_the_dense_model_of_transformers_says_the_same(family: str, tmp_path: Path) -> None:
    """Nothing of besa's computes in it."""
    model = packed(FAMILIES[family][0], tmp_path, torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    for found, expected in zip(steps(model, 12), steps(dense, 12), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


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


class Walk:
    """Blocks of a model called by hand for one token after the other, with something done between them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self.past = model, DynamicCache(config=model.config)
        model(torch.arange(4).view(1, 4), past_key_values=self.past)

    @torch.inference_mode()
    def step(
        self, number: int, blocks: int = 4, between: Callable[[int, Tensor], Tensor] = lambda index, x: x
    ) -> list[Tensor]:
        decoder, tokens = self._model.model, self.past.get_seq_length()
        x = decoder.embed_tokens(torch.tensor([[number]]))
        angles = decoder.rotary_emb(x, torch.tensor([[tokens]]))
        found = []
        for index, block in enumerate(decoder.layers[:blocks]):
            x = block(x, attention_mask=None, position_embeddings=angles, past_key_values=self.past)
            found.append(x.clone())
            x = between(index, x)
        return found + [part for layer in self.past.layers for part in (layer.keys, layer.values)]


def steered(index: int, x: Tensor) -> Tensor:
    return x + 1 if index == 1 else x


def steered_in_place(index: int, x: Tensor) -> Tensor:
    return x.add_(1) if index == 1 else x


@pytest.mark.parametrize("between", [steered, steered_in_place])
def test_what_is_done_to_an_output_is_met(
    halves: PreTrainedModel, between: Callable[[int, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that were computed ahead are computed again then, and no more in one call with those before."""
    walk, expected = Walk(halves), Walk(usual(halves))
    with counted(monkeypatch) as calls:
        for token in range(3):
            assert same(walk.step(token), expected.step(token))
        for token in range(3):
            assert same(walk.step(token, between=between), expected.step(token, between=between))
    assert calls == [1] * 4 + [4] * 2 + [4, 2] + [2, 2] * 2


def test_blocks_not_asked_for_leave_no_trace(halves: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a model ends early, or a step is interrupted: the cache of other blocks does not grow."""
    walk, expected = Walk(halves), Walk(usual(halves))
    with counted(monkeypatch) as calls:
        for token, blocks in enumerate((4, 4, 2, 2)):
            assert same(walk.step(token, blocks), expected.step(token, blocks))
        for token in range(2):
            assert same(walk.step(token, 3), expected.step(token, 3))
    assert calls == [1] * 4 + [4] + [4] + [2] + [2, 2] + [2, 1]


def test_caches_that_change_between_blocks_are_met(halves: PreTrainedModel) -> None:
    walk, expected = Walk(halves), Walk(usual(halves))
    for token in range(3):
        assert same(walk.step(token), expected.step(token))

    def forget(walk: Walk) -> Callable[[int, Tensor], Tensor]:
        def between(index: int, x: Tensor) -> Tensor:
            if index == 1:
                walk.past.layers[3].crop(-2)
            return x

        return between

    for token in range(3):
        assert same(walk.step(token, between=forget(walk)), expected.step(token, between=forget(expected)))


def test_what_is_changed_in_a_block_is_met(halves: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks and functions of its parts, and hooks of its own."""
    each, seen = copy.deepcopy(halves), []

    def see(module: object, given: object, *output: object) -> None:
        seen.append(module)

    block = each.model.layers[1]
    with torch.inference_mode():
        expected = usual(halves)(torch.arange(6).view(1, 6), output_hidden_states=True).hidden_states[-1]
    for part in (block.mlp, block.mlp.act_fn, block.input_layernorm, block.self_attn, block):
        for register in (part.register_forward_hook, part.register_forward_pre_hook):
            steps(each, 2)
            handle, before = register(see), len(seen)
            assert same(steps(each, 4), steps(usual(halves), 4))
            assert len(seen) == before + 4
            handle.remove()
    handle = nn.modules.module.register_module_forward_hook(see)
    try:
        seen.clear()
        steps(each, 3)
        assert len([module for module in seen if module is block.mlp.up_proj]) == 3
    finally:
        handle.remove()
    with counted(monkeypatch) as calls:
        steps(each, 2)
        block.mlp.act_fn = nn.ReLU()
        other = usual(each)
        assert sum(calls) == 4
        assert same(steps(each, 3), steps(other, 3))
        assert sum(calls) == 4 + 2 * 4  # its attention alone
    with torch.inference_mode():
        past = DynamicCache(config=halves.config)
        halves(torch.arange(5).view(1, 5), past_key_values=past)
        for _ in range(2):
            found = halves(torch.tensor([[5]]), past_key_values=past, output_hidden_states=True).hidden_states
            past.crop(-1)
    assert len(found) == 5
    torch.testing.assert_close(found[-1], expected[:, -1:], rtol=0.05, atol=0.05)


def test_a_copy_of_a_block_is_of_no_other(halves: PreTrainedModel) -> None:
    size = len(pickle.dumps(halves.model.layers[0]))
    steps(halves, 3)
    assert len(pickle.dumps(halves.model.layers[0])) == size
    copied = copy.deepcopy(halves)
    assert same(steps(copied, 3), steps(halves, 3))


def test_two_threads_decode_with_one_model(halves: PreTrainedModel) -> None:
    expected = steps(halves, 20)
    with ThreadPoolExecutor(2) as pool:
        for found in [pool.submit(steps, halves, 20) for _ in range(4)]:
            assert same(found.result(), expected)


def test_generate_calls_all_blocks_at_once(halves: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = {"input_ids": torch.arange(5).view(1, 5), "attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with counted(monkeypatch) as calls:
        found = halves.generate(**prompt, **options)
    assert calls == [1] * 4 + [4] * 4
    assert torch.equal(found, usual(halves).generate(**prompt, **options))


def test_parts_that_do_not_fit_are_refused(halves: PreTrainedModel) -> None:
    block = halves.model.layers[0]
    linears = decoding.linears_of(block.mlp, block_decoding.LINEARS, torch.bfloat16)
    attention = block.self_attn.forward.step(torch.bfloat16)
    table = torch.zeros(1 << 16, dtype=torch.int16)
    kernels.Block(attention, [None] * 4, linears, table)
    wide = kernels.Norm(torch.ones(32, dtype=torch.bfloat16), 1e-6, FORMS[0])
    for norms, given, values in (
        ([None] * 4, linears[::-1], table),
        ([None] * 4, linears, table[1:]),
        ([wide, None, None, None], linears, table),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            kernels.Block(attention, norms, given, values)
