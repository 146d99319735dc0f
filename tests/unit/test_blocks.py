"""A decoder taken apart into blocks computes what the whole model computes."""

import copy

import pytest
import torch
import transformers
from torch import nn

from besa.errors import BesaError
from besa.models.ends import capture_inputs
from besa.models.finding import find_blocks
from tests.prunable_weights import prunable_weights

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
CONFIGS = {
    "bloom": lambda: transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=3, n_head=4),  # masks carry alibi
    "falcon": lambda: transformers.FalconConfig(**SMALL, num_attention_heads=4, alibi=False),  # blocks return tuples
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, **HEADS, head_dim=8, sliding_window=4
    ),  # masks differ by layer
    "gpt2": lambda: transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4),  # transposed weights
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, **HEADS, num_local_experts=4),  # stacked experts
    "opt": lambda: transformers.OPTConfig(**SMALL, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, **HEADS, head_dim=8),
}


@pytest.fixture
def tokens_NT():
    return torch.randint(64, (5, 12), generator=torch.Generator().manual_seed(0))


def forwards(module: nn.Module) -> dict[str, object]:
    """The forward functions set on instances; a plain model has none."""
    return {name: part.__dict__["forward"] for name, part in module.named_modules() if "forward" in part.__dict__}


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in module.modules())


def captured_whole(model, blocks, tokens_NT, batch):
    return torch.cat(list(capture_inputs(model, blocks, tokens_NT, batch)))


def outputs(block, x_NTC, batch):
    y_NTC = torch.full_like(x_NTC, torch.nan)
    block.run(x_NTC, batch, into=y_NTC)
    return y_NTC


def test_find_blocks(tiny_llama):
    blocks = find_blocks(tiny_llama)
    assert [block.name for block in blocks] == [f"model.layers.{i}" for i in range(8)]
    assert [block.index for block in blocks] == list(range(8))
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    for block in blocks:
        assert block.module is tiny_llama.get_submodule(block.name)
        assert list(block.prunables) == [f"{block.name}.{part}" for part in parts]
        for name in block.prunables:
            weight = tiny_llama.get_submodule(name).weight
            assert block.weight(name).data_ptr() == weight.data_ptr()
            assert torch.equal(block.weight(name), weight)
        assert prunable_weights(block) == 2 * 96 * 96 + 2 * 48 * 96 + 3 * 256 * 96


class Nothing(nn.Module):
    """A model with a stack of the expected depth and no linears, or of another depth."""

    def __init__(self, depth: int):
        super().__init__()
        self.config = transformers.LlamaConfig(num_hidden_layers=3)
        self.layers = nn.ModuleList(nn.LayerNorm(2) for _ in range(depth))


@pytest.mark.parametrize(
    ("depth", "sentence"),
    [
        (2, "Nothing has no stack of decoder blocks that besa can find: use a causal decoder."),
        (3, "layers.0 of Nothing has no linear weights to prune."),
    ],
)
def test_models_without_blocks_are_refused(depth, sentence):
    with pytest.raises(BesaError) as caught:
        find_blocks(Nothing(depth))
    assert str(caught.value) == sentence


@pytest.mark.parametrize("alias", ["parameter", "memory"])
def test_two_linears_of_one_weight_are_refused(alias):
    model = Nothing(3)
    model.layers = nn.ModuleList(nn.ModuleDict({"k": nn.Linear(4, 4), "v": nn.Linear(4, 4)}) for _ in range(3))
    shared = model.layers[1]["k"].weight
    model.layers[1]["v"].weight = shared if alias == "parameter" else nn.Parameter(shared.data)
    with pytest.raises(BesaError, match=r": layers\.1\.k\.weight and layers\.1\.v\.weight are one weight\.$"):
        find_blocks(model)


def test_the_largest_stack_of_the_right_depth_is_the_decoder():
    model = Nothing(3)
    model.experts = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(3)) for _ in range(3))
    assert [block.name for block in find_blocks(model)] == [f"experts.{i}" for i in range(3)]


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_blocks_one_after_another_are_the_model(tiny_llama, tokens_NT, batch):
    expected_NTV = tiny_llama(input_ids=tokens_NT, use_cache=False).logits
    blocks = find_blocks(tiny_llama)
    parts = list(capture_inputs(tiny_llama, blocks, tokens_NT, batch))
    assert [len(part_NTC) for part_NTC in parts] == [min(batch, 5 - start) for start in range(0, 5, batch)]
    x_NTC = torch.cat(parts)
    assert torch.equal(x_NTC, tiny_llama.model.embed_tokens(tokens_NT))
    sizes = [(n, tokens_NT.shape[1]) for n in range(1, min(batch, 5) + 1)]
    assert all(sorted(block.arguments) == sizes for block in blocks)
    for block in blocks:
        block.run(x_NTC, batch, into=x_NTC)
    torch.testing.assert_close(tiny_llama.lm_head(tiny_llama.model.norm(x_NTC)), expected_NTV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_other_architectures_block_by_block(architecture, tokens_NT, batch):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture]()).eval().requires_grad_(False)
    blocks = find_blocks(model)
    assert len(blocks) == 3
    expected: list[torch.Tensor] = []
    handles = [
        block.module.register_forward_hook(lambda _, __, y: expected.append(y[0] if isinstance(y, tuple) else y))
        for block in blocks
    ]
    model(input_ids=tokens_NT, use_cache=False)
    for handle in handles:
        handle.remove()

    x_NTC = captured_whole(model, blocks, tokens_NT, batch)
    for block, y_NTC in zip(blocks, expected, strict=True):
        assert not torch.allclose(x_NTC, y_NTC, rtol=1e-2)  # the block does something
        block.run(x_NTC, batch, into=x_NTC)
        torch.testing.assert_close(x_NTC, y_NTC, rtol=1e-4, atol=1e-5)


def test_capture_leaves_the_model_as_it_was(tiny_llama, tokens_NT):
    before_NTV = tiny_llama(input_ids=tokens_NT, use_cache=False).logits
    captured_whole(tiny_llama, find_blocks(tiny_llama), tokens_NT, 2)
    assert forwards(tiny_llama) == {}
    assert hooks(tiny_llama) == 0
    assert torch.equal(tiny_llama(input_ids=tokens_NT, use_cache=False).logits, before_NTV)


def test_capture_leaves_the_model_as_it_was_when_it_is_not_read_to_the_end(tiny_llama, tokens_NT):
    parts = capture_inputs(tiny_llama, find_blocks(tiny_llama), tokens_NT, 2)
    next(parts)
    assert forwards(tiny_llama) != {}
    parts.close()
    assert forwards(tiny_llama) == {}
    assert hooks(tiny_llama) == 0


def test_capture_needs_no_weights_of_the_blocks(tiny_llama, tokens_NT):
    expected_NTC = tiny_llama.model.embed_tokens(tokens_NT)
    tiny_llama.model.layers.to("meta")
    assert torch.equal(captured_whole(tiny_llama, find_blocks(tiny_llama), tokens_NT, 2), expected_NTC)


def test_capture_leaves_the_model_as_it_was_when_it_fails(tiny_llama, tokens_NT):
    blocks = find_blocks(tiny_llama)
    with pytest.raises(IndexError):
        captured_whole(tiny_llama, blocks, tokens_NT + 10**6, 2)  # no such tokens
    handle = blocks[3].module.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        captured_whole(tiny_llama, blocks, tokens_NT, 2)  # fails half way through the blocks
    handle.remove()
    assert forwards(tiny_llama) == {}
    assert hooks(tiny_llama) == 0
    assert tiny_llama(input_ids=tokens_NT, use_cache=False).logits.isfinite().all()


def test_capture_keeps_a_forward_that_was_wrapped_before(tiny_llama, tokens_NT):
    """As accelerate does for a model loaded with a device_map."""
    module = tiny_llama.model.layers[0]
    original = module.forward
    module.forward = lambda *inputs, **arguments: original(*inputs, **arguments)
    before = forwards(tiny_llama)
    captured_whole(tiny_llama, find_blocks(tiny_llama), tokens_NT, 2)
    assert forwards(tiny_llama) == before


@pytest.fixture
def captured(tiny_llama, tokens_NT):
    blocks = find_blocks(tiny_llama)
    return blocks[2], captured_whole(tiny_llama, blocks, tokens_NT, 5)


def test_run_does_not_depend_on_the_batch(captured):
    block, x_NTC = captured
    before_NTC = x_NTC.clone()
    together_NTC = outputs(block, x_NTC, 5)
    for batch in (1, 2, 3, 4):
        torch.testing.assert_close(outputs(block, x_NTC, batch), together_NTC, rtol=1e-5, atol=1e-5)
    assert torch.equal(x_NTC, before_NTC)
    assert torch.equal(block(x_NTC), together_NTC)


def test_run_may_write_over_its_inputs_or_throw_its_outputs_away(captured):
    block, x_NTC = captured
    before_NTC, expected_NTC = x_NTC.clone(), outputs(block, x_NTC, 2)
    assert block.run(x_NTC, 2) is None
    assert torch.equal(x_NTC, before_NTC)
    block.run(x_NTC, 2, into=x_NTC)
    assert torch.equal(x_NTC, expected_NTC)


def test_run_takes_no_gradients(captured):
    block, x_NTC = captured
    block.module.requires_grad_()
    assert block(x_NTC).requires_grad
    assert not outputs(block, x_NTC, 5).requires_grad


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 4])
def test_outputs_that_are_not_finite_are_refused(captured, value, place):
    block, x_NTC = captured
    x_NTC[place, -1, 3] = value
    for into in (None, x_NTC):
        with pytest.raises(BesaError, match=r"^The output of model\.layers\.2 has NaN or infinity: .*\.$") as caught:
            block.run(x_NTC, 1, into=into)
        assert "\n" not in str(caught.value)


def test_replaced_weights_are_used_and_get_the_gradients(captured):
    block, x_NTC = captured
    own_NTC = block(x_NTC)
    half = {name: block.weight(name) / 2 for name in block.prunables}
    changed = copy.deepcopy(block)
    for name in changed.prunables:
        changed.weight(name).copy_(half[name])
    weights = {name: weight.clone().requires_grad_() for name, weight in half.items()}
    y_NTC = block(x_NTC, weights)
    assert torch.equal(y_NTC, changed(x_NTC))
    assert not torch.allclose(y_NTC, own_NTC)
    assert torch.equal(block(x_NTC), own_NTC)  # the block's own weights are back

    loss = y_NTC.double().square().sum()
    gradients = torch.autograd.grad(loss, list(weights.values()))
    assert all(parameter.grad is None for parameter in block.module.parameters())
    changed.module.requires_grad_()
    expected = torch.autograd.grad(
        changed(x_NTC).double().square().sum(),
        [changed.module.get_parameter(prunable.parameter) for prunable in changed.prunables.values()],
    )
    for got, wanted in zip(gradients, expected, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_replaced_weights_of_other_layouts(architecture, tokens_NT):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture]()).eval().requires_grad_(False)
    blocks = find_blocks(model)
    x_NTC, block = captured_whole(model, blocks, tokens_NT, 5), blocks[1]
    own_NTC = block(x_NTC)
    half = {name: block.weight(name) / 2 for name in list(block.prunables)[::2]}
    y_NTC = block(x_NTC, half)
    assert not torch.allclose(y_NTC, own_NTC)
    assert torch.equal(block(x_NTC), own_NTC)
    for name, weight in half.items():
        block.weight(name).copy_(weight)
    assert torch.equal(block(x_NTC), y_NTC)


def test_only_some_weights_may_be_replaced(captured):
    block, x_NTC = captured
    name = f"{block.name}.mlp.down_proj"
    zero_OI = torch.zeros_like(block.weight(name))
    without_mlp = copy.deepcopy(block)
    without_mlp.weight(name).zero_()
    assert torch.equal(block(x_NTC, {name: zero_OI}), without_mlp(x_NTC))


def test_arguments_follow_the_hidden_states_to_their_device(captured):
    block, x_NTC = captured
    block.module.to("meta")
    y_NTC = block(x_NTC.to("meta"))
    assert y_NTC.is_meta
    assert y_NTC.shape == x_NTC.shape
    assert all(part.device == x_NTC.device for part in block.arguments[tuple(x_NTC.shape[:2])]["position_embeddings"])


def test_the_beginnings_of_sequences_run_too(tiny_llama, tokens_NT):
    """Causal: what comes out for the first tokens is what comes out for them in the whole sequence."""
    blocks = find_blocks(tiny_llama)
    x_NTC = torch.cat(list(capture_inputs(tiny_llama, blocks, tokens_NT, 2, {3, 7})))
    length = tokens_NT.shape[1]
    assert sorted(blocks[0].arguments) == [(n, t) for n in (1, 2) for t in sorted({3, 7, length})]
    for tokens in (3, 7):
        start_NTC = blocks[0](x_NTC[:2, :tokens])
        torch.testing.assert_close(start_NTC, blocks[0](x_NTC[:2])[:, :tokens], rtol=1e-4, atol=1e-5)


ROPE = {"rope_theta": 10_000.0, "original_max_position_embeddings": 16}
SCALED = {
    "longrope": lambda: transformers.Phi3Config(
        **SMALL, **HEADS, pad_token_id=0, max_position_embeddings=64, original_max_position_embeddings=16,
        rope_parameters=ROPE | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
    ),
    "dynamic": lambda: transformers.LlamaConfig(
        **SMALL, **HEADS, max_position_embeddings=16, rope_parameters=ROPE | {"rope_type": "dynamic", "factor": 4.0}
    ),
}  # fmt: skip


@pytest.mark.parametrize("scaling", SCALED)
def test_positions_that_depend_on_the_length_are_refused(scaling):
    """Where one scaling serves the whole sequence and its beginning, nothing is in the way."""
    model = transformers.AutoModelForCausalLM.from_config(SCALED[scaling]())
    tokens_NT = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    refused = r"other rotary embeddings in sequences of 24 tokens than in their first 12.*give a shorter --seqlen"
    with pytest.raises(BesaError, match=refused):
        list(capture_inputs(model, find_blocks(model), tokens_NT, 2, [12, 24]))
    assert len(list(capture_inputs(model, find_blocks(model), tokens_NT[:, :16], 2, [8, 16]))) == 1
