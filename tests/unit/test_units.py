"""What is pruned at once: blocks as one function, attention apart from the MLP, and the output of every linear."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from besa.errors import BesaError
from besa.methods.allocation.outputs import errors_of_linears
from besa.models.blocks import Block
from besa.models.ends import capture_inputs
from besa.models.finding import find_blocks
from besa.models.units import Part, parts, sharing, units

SEQUENCES, TOKENS = 3, 12
SIZES = {"num_hidden_layers": 3, "vocab_size": 64}
WIDE = {"hidden_size": 32, "num_attention_heads": 4}


def model_of(kind: str, **sizes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **sizes)).eval().requires_grad_(False)


LLAMA = WIDE | {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES = {
    "llama": LLAMA,
    "gpt2": {"n_embd": 32, "n_head": 4, "n_positions": 64},
    "gpt_neox": WIDE | {"intermediate_size": 48},  # attention and MLP both read the block's input
    "opt": WIDE | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gemma2": LLAMA | {"head_dim": 8},
    "mixtral": LLAMA | {"num_local_experts": 4},
}


@pytest.fixture
def llama():
    return model_of("llama", **LLAMA)


def run_in(model) -> tuple[list[Block], torch.Tensor]:
    blocks = find_blocks(model)
    tokens = torch.arange(SEQUENCES * TOKENS).reshape(SEQUENCES, TOKENS) % 64
    return blocks, torch.cat(list(capture_inputs(model, blocks, tokens, SEQUENCES)))


def halved(block: Block) -> dict[str, torch.Tensor]:
    return {name: block.weight(name) / 2 for name in block.prunables}


def test_two_blocks_are_one_after_the_other(llama):
    blocks, x_NTC = run_in(llama)
    first, second, third = blocks
    pair, alone = units(blocks, "two-blocks")
    assert (pair.blocks, alone.blocks) == ((first, second), (third,))
    assert torch.equal(pair(x_NTC), second(first(x_NTC)))
    weights = halved(second)
    assert torch.equal(pair(x_NTC, weights), second(first(x_NTC), weights))
    expected_NTC, into_NTC = second(first(x_NTC)), torch.empty_like(x_NTC)
    pair.run(x_NTC, SEQUENCES, into=into_NTC)
    assert torch.equal(into_NTC, expected_NTC)
    assert list(pair.prunables) == [*first.prunables, *second.prunables]
    for block in (first, second):
        for name in block.prunables:
            assert pair.weight(name).data_ptr() == block.weight(name).data_ptr()


def test_gradients_reach_the_weights_of_both_blocks(llama):
    blocks, x_NTC = run_in(llama)
    pair = units(blocks, "two-blocks")[0]
    weights = {name: pair.weight(name).clone().requires_grad_() for name in pair.prunables}
    pair(x_NTC, weights).square().sum().backward()
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in weights.values())


@pytest.mark.parametrize("kind", FAMILIES)
def test_with_a_silent_mlp_a_block_puts_out_its_stream_after_attention(kind):
    """Biases of an MLP stay: the teacher has them too."""
    model = model_of(kind, **FAMILIES[kind])
    blocks, x_NTC = run_in(model)
    unit = units(blocks, "attn-mlp")[1]
    attention, rest = parts(unit, "attn-mlp")
    assert set(attention.names).isdisjoint(rest.names)
    assert set(attention.names) | set(rest.names) == set(unit.prunables)
    assert attention.silent == rest.names
    assert rest.silent == ()
    module = next(m for name, m in blocks[1].module.named_children() if "att" in name and "norm" not in name)
    seen = []
    handle = module.register_forward_hook(lambda _, __, y: seen.append(y[0] if isinstance(y, tuple) else y))
    y_NTC = unit.silencing(attention.silent)(x_NTC)
    handle.remove()
    added_NTC = seen[0].reshape_as(x_NTC)
    if kind == "gemma2":  # which norms what attention adds
        added_NTC = blocks[1].module.post_attention_layernorm(added_NTC)
    rest_NTC = y_NTC - x_NTC - added_NTC
    assert float(rest_NTC.abs().max()) < 1e-5 * float(y_NTC.abs().max())
    assert not torch.allclose(unit(x_NTC), y_NTC, atol=1e-4)


def test_attention_without_a_name_is_refused():
    module = nn.ModuleDict({"mixer": nn.Linear(4, 4), "mlp": nn.Linear(4, 4)})
    model = nn.Module()
    model.layers = nn.ModuleList([module])
    model.config = type("Config", (), {"get_text_config": lambda self: type("C", (), {"num_hidden_layers": 1})()})()
    (unit,) = units(find_blocks(model), "attn-mlp")
    with pytest.raises(
        BesaError,
        match=r"^The module names of layers\.0 do not separate attention and MLP: use allocation\.granularity=block\.$",
    ):
        parts(unit, "attn-mlp")
    assert parts(unit, "block") == [Part(("layers.0.mixer", "layers.0.mlp"))]


def test_who_shares_a_budget(llama):
    blocks = find_blocks(llama)
    names = [list(block.prunables) for block in blocks]
    assert [sharing(unit, "linear") for unit in units(blocks, "linear")] == [[(n,) for n in own] for own in names]
    assert sharing(units(blocks, "attn-mlp")[0], "attn-mlp") == [tuple(names[0][:4]), tuple(names[0][4:])]
    assert sharing(units(blocks, "block")[2], "block") == [tuple(names[2])]
    assert [sharing(unit, "two-blocks") for unit in units(blocks, "two-blocks")] == [
        [(*names[0], *names[1])],
        [tuple(names[2])],
    ]


@pytest.mark.parametrize("plain", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_errors_of_linears_are_those_of_their_outputs_in_the_dense_block(kind, plain):
    model = model_of(kind, **FAMILIES[kind])
    if kind == "mixtral":
        model.set_experts_implementation("eager")
    blocks, x_NTC = run_in(model)
    block = blocks[1]
    names = [name for name in block.prunables if "experts" not in name]
    inputs, modules = {}, dict(block.module.named_modules())
    handles = [
        modules[name[len(block.name) + 1 :]].register_forward_pre_hook(
            lambda _, given, name=name: inputs.__setitem__(name, given[0])
        )
        for name in names
    ]
    block(x_NTC)
    for handle in handles:
        handle.remove()
    weights = {name: (block.weight(name) * (block.weight(name).abs() > 0.01)).requires_grad_() for name in names}
    found = errors_of_linears(units(blocks, "linear")[1], x_NTC, weights, plain)
    found.backward()
    gradients = {name: weight.grad for name, weight in weights.items()}
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    errors = []
    for name in names:
        x_TI = inputs[name].reshape(-1, inputs[name].shape[-1])
        y_NTO, target_NTO = (x_TI @ leaves[name].T)[None], (x_TI @ block.weight(name).T)[None]
        relative_O = (y_NTO - target_NTO).square().sum((0, 1)) / target_NTO.square().sum((0, 1))
        whole = (y_NTO - target_NTO).square().sum() / target_NTO.square().sum()
        errors.append((1 - plain) * relative_O.mean() + plain * whole)
    expected = torch.stack(errors).mean()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert found.item() > 0.001
    for name in names:
        assert torch.allclose(gradients[name], leaves[name].grad, rtol=1e-3, atol=1e-7), name


def test_an_expert_that_no_token_reaches_gets_a_gradient_of_nothing():
    model = model_of("mixtral", **FAMILIES["mixtral"])
    model.set_experts_implementation("eager")
    blocks, x_NTC = run_in(model)
    block = blocks[0]
    weights = {name: (0.5 * block.weight(name)).requires_grad_() for name in block.prunables}
    block.arguments[1, 1] = {
        key: tuple(part[:, :1] for part in value) if isinstance(value, tuple) else value
        for key, value in block.arguments[SEQUENCES, TOKENS].items()
    }
    error = errors_of_linears(block, x_NTC[:1, :1], weights)  # one token goes to two of the four experts
    error.backward()
    assert error.item() == pytest.approx(0.25, rel=1e-3)  # halved weights: a quarter of the squared norm
    idle = [name for name, weight in weights.items() if not bool(weight.grad.any())]
    assert sum("experts" in name for name in idle) == len(idle) == 4
