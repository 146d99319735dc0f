"""Blocks of packed models in bfloat16, all in one call for a token: whatever happens between them is met."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, PreTrainedModel

import besa
from besa.kernels import decoding as kernels
from besa.kernels import dense
from besa.kernels.norm import FORMS
from besa.methods.recipe import Recipe
from besa.runtime import block_decoding, decoding
from besa.runtime.block_decoding import VAIN
from besa.runtime.dense import DenseLinear
from besa.runtime.linear import SparseLinear
from tests.decoded import SIZE, counted, packed, same, steps, usual
from tests.slowly import some_slow

pytestmark = pytest.mark.skipif(not kernels.serves(torch.float32), reason="needs a compiler")


TINY = Path(__file__).parents[1] / "assets" / "tiny-llama"
TEXT = str(TINY / "calibration.txt")


@pytest.fixture
def halves(tmp_path: Path) -> PreTrainedModel:
    """Whose blocks are one call."""
    return packed(LlamaConfig(**SIZE), tmp_path, torch.bfloat16)


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
    """Blocks that were computed ahead are computed again then, and soon no more in one call with those before."""
    walk, expected = Walk(halves), Walk(usual(halves))
    with counted(monkeypatch) as calls:
        for token in range(3):
            assert same(walk.step(token), expected.step(token))
        for token in range(VAIN + 2):
            assert same(walk.step(token, between=between), expected.step(token, between=between))
    assert calls == [1] * 4 + [4] * 2 + [4, 2] * VAIN + [2, 2] * 2


def test_blocks_not_asked_for_leave_no_trace(halves: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a model ends early: the cache of other blocks does not grow."""
    walk, expected = Walk(halves), Walk(usual(halves))
    with counted(monkeypatch) as calls:
        for token, blocks in enumerate((4, 4, 2, 2)):
            assert same(walk.step(token, blocks), expected.step(token, blocks))
        for token in range(2):
            assert same(walk.step(token, 3), expected.step(token, 3))
    assert calls == [1] * 4 + [4] + [4] + [2] + [2, 2] + [2, 1]


def test_a_token_that_is_interrupted_parts_no_blocks(halves: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    walk, expected = Walk(halves), Walk(usual(halves))
    with counted(monkeypatch) as calls:
        for _ in range(2):
            assert same(walk.step(0), expected.step(0))
        walk.step(1, 2)
        for layer in walk.past.layers[:2]:
            layer.crop(-1)
        for token in range(3):
            assert same(walk.step(token), expected.step(token))
    assert calls == [1] * 4 + [4] * 5


def test_threads_do_not_disturb_each_other(halves: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences, whose blocks are called in turn: each token is one call, as if the other thread were not there."""
    walks, expected, turns = [Walk(halves), Walk(halves)], Walk(usual(halves)), Barrier(2)

    def meet(index: int, x: Tensor) -> Tensor:
        turns.wait(60)
        return x

    with counted(monkeypatch) as calls, ThreadPoolExecutor(2) as threads:
        walks[0].step(0)
        expected.step(0)
        walks[1].step(0)
        calls.clear()
        for token in range(3):
            found = threads.map(lambda walk, token=token: walk.step(token, between=meet), walks)
            step = expected.step(token)
            assert all(same(each, step) for each in found)
    assert calls == [4] * 6


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


def test_a_cache_of_another_shape_further_on(halves: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not written beyond its end by the call of the first block, and refused as the family does."""
    walk = Walk(halves)
    for token in range(2):
        walk.step(token)
    layer = walk.past.layers[2]
    layer.keys, layer.values = layer.keys[:, :1], layer.values[:, :1]
    with counted(monkeypatch) as calls, pytest.raises(RuntimeError):
        walk.step(2)
    assert calls == [2]


@pytest.mark.parametrize("bits", some_slow([4, 8], {8}))
def test_blocks_of_codes(
    bits: int, shallow_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load("wanda-int4", overrides=[f"quantization.bits={bits}"])
    besa.compress(shallow_llama_folder, recipe, TEXT, out=tmp_path / "dense", samples=2, seqlen=16, dtype="bfloat16")
    besa.pack(tmp_path / "dense", tmp_path / "packed")
    model = besa.load(tmp_path / "packed")
    expected = steps(usual(model), 6)
    with counted(monkeypatch) as calls:
        assert same(steps(model, 6), expected)
    blocks = len(model.model.layers)
    assert calls == [1] * blocks + [blocks] * 4
    assert {linear.bits for linear in model.modules() if isinstance(linear, SparseLinear)} == {bits}


def test_a_block_with_dense_linears(halves: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are computed by the kernel for few rows."""
    if not dense.paths():
        return
    generator, block = torch.Generator().manual_seed(0), halves.model.layers[1]
    for name, bias in (("mlp.up_proj", True), ("mlp.down_proj", False)):
        linear = nn.Linear(*reversed(block.get_submodule(name).bitmask.shape), bias=bias, dtype=torch.bfloat16).eval()
        for parameter in linear.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16)
        block.set_submodule(name, DenseLinear(linear))
    block.requires_grad_(False)
    with counted(monkeypatch) as calls:
        assert same(steps(halves, 4), steps(usual(halves), 4))
    assert calls[4:] == [4, 4]
    block.mlp.up_proj.weight.data = -block.mlp.up_proj.weight.data
    assert same(steps(halves, 3), steps(usual(halves), 3))


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
