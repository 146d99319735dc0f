"""Whole layers: the score against cosines taken one token at a time, budgets in blocks, and what is left of a block."""

import math

import pytest
import torch
from transformers import PreTrainedModel

from besa import BesaError, Recipe
from besa.data.calibration import Calibration
from besa.methods.allocation import Depth
from besa.methods.survey import Survey
from besa.methods.targets.budgets import budgets
from besa.methods.targets.change import Change
from besa.models.activations import Room
from besa.models.ends import capture_inputs
from besa.models.finding import find_blocks
from besa.models.layers import biases, layer, passes_on
from besa.models.streaming import DecoderInMemory
from besa.pruning import prune_blocks
from besa.system.devices import CPU
from tests.integration.test_families import TOKENS, config_of, random_model
from tests.prunable_weights import prunable_weights

TINY = Calibration(torch.randint(0, 1024, (4, 16), generator=torch.Generator().manual_seed(0)), "random", 0)


def survey_of(model: PreTrainedModel, calibration: Calibration) -> Survey:
    decoder = DecoderInMemory(model)
    names = [tuple(block.prunables) for block in decoder.blocks]
    return Survey(decoder, calibration, names, 0.5, 2, CPU, Room(CPU, None), 7, [[]] * len(names))


def cosine(x: list[float], y: list[float]) -> float:
    dot, lengths = sum(a * b for a, b in zip(x, y, strict=True)), sum(a * a for a in x) * sum(b * b for b in y)
    return dot / math.sqrt(lengths)


def mean_change(entering: torch.Tensor, leaving: torch.Tensor) -> float:
    pairs = list(zip(entering.flatten(0, 1).tolist(), leaving.flatten(0, 1).tolist(), strict=True))
    return sum(1 - cosine(x, y) for x, y in pairs) / len(pairs)


def test_the_change_of_a_block_is_one_minus_the_cosine_of_its_tokens(tiny_llama: PreTrainedModel) -> None:
    with torch.no_grad():
        states = tiny_llama.model(TINY.tokens_NT, output_hidden_states=True, use_cache=False).hidden_states
    found = Change().measure(survey_of(tiny_llama, TINY))
    assert len(found) == 8
    for index in range(7):  # the last hidden state is after the final norm
        assert found[index] == pytest.approx(mean_change(states[index], states[index + 1]), rel=1e-5)


@pytest.mark.parametrize(("family", "parallel"), [("llama", False), ("gemma2", False), ("phi", True)])
def test_the_change_of_half_a_block_is_that_of_the_residual_stream(family: str, parallel: bool) -> None:
    """Seen by hooks on the modules: what attention and MLP add, behind norms that follow them."""
    model = random_model(config_of(family))
    seen: dict[str, list[torch.Tensor]] = {"x": [], "attention": [], "y": []}

    def output(value: object) -> torch.Tensor:
        return value[0] if isinstance(value, tuple) else value  # type: ignore[return-value]

    for block in find_blocks(model):
        after = block.module.post_attention_layernorm if family == "gemma2" else block.module.self_attn
        after.register_forward_hook(lambda _, __, added: seen["attention"].append(output(added).clone()))
        block.module.register_forward_pre_hook(lambda _, given: seen["x"].append(given[0].clone()))
        block.module.register_forward_hook(lambda _, __, result: seen["y"].append(output(result).clone()))
    with torch.no_grad():
        model(TOKENS.tokens_NT, use_cache=False)
    between = [x + added for x, added in zip(seen["x"], seen["attention"], strict=True)]
    expected = {
        "attention": [mean_change(x, y) for x, y in zip(seen["x"], between, strict=True)],
        "mlp": [mean_change(x, y) for x, y in zip(between, seen["y"], strict=True)],
    }
    for layers in ("attention", "mlp"):
        found = Change(layers=layers).measure(survey_of(random_model(config_of(family)), TOKENS))
        assert found == pytest.approx(expected[layers], rel=2e-3), (layers, parallel)


@pytest.mark.parametrize("layers", ["both", "attention", "mlp"])
def test_the_layers_that_change_least_go_and_nothing_else(tiny_llama: PreTrainedModel, layers: str) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    changes = Change(layers=layers).measure(survey_of(tiny_llama, TINY))
    gone = sorted(range(8), key=lambda index: changes[index])[:3]
    recipe = Recipe.load("depth", overrides=[f"allocation.layers={layers}", "allocation.blocks=3"])
    records = prune_blocks(DecoderInMemory(tiny_llama), recipe, TINY).records
    kind = "blocks" if layers == "both" else layers
    for block, record in zip(find_blocks(tiny_llama), records, strict=True):
        empty = set(layer(block, layers)) if block.index in gone else set()
        assert record.structures == {kind: (1, 0 if empty else 1)}
        assert record.zeros == sum(block.prunables[name].numel for name in empty)
        for name in block.prunables:
            expected = torch.zeros_like(block.weight(name)) if name in empty else before[f"{name}.weight"]
            assert torch.equal(block.weight(name), expected)


@pytest.mark.parametrize(
    ("sparsity", "layers", "number"),
    [
        (0.1, "both", 1),
        (0.25, "both", 2),
        (0.5, "both", 4),
        (0.0, "both", 0),
        (0.01, "both", 1),
        (0.1, "mlp", 1),
        (0.06, "attention", 2),
    ],
)
def test_a_share_is_the_nearest_number_of_layers(
    pristine_tiny_llama: PreTrainedModel, sparsity: float, layers: str, number: int
) -> None:
    blocks = find_blocks(pristine_tiny_llama)
    plan = budgets(blocks, Recipe(sparsity=sparsity, allocation=Depth(layers=layers)), [float(n) for n in range(8)])
    size = sum(blocks[0].prunables[name].numel for name in layer(blocks[0], layers))
    assert [budget.zeros for (budget,) in plan] == [size] * number + [0] * (8 - number)
    total = 8 * prunable_weights(blocks[0])
    possible = range(1 if sparsity else 0, 9)
    assert abs(number * size - sparsity * total) == min(abs(n * size - sparsity * total) for n in possible)


def test_of_equal_layers_the_later_go_and_skipped_ones_stay(pristine_tiny_llama: PreTrainedModel) -> None:
    blocks = find_blocks(pristine_tiny_llama)
    recipe = Recipe(allocation=Depth(blocks=2), skip=("*.7.mlp.up_proj", "*.5.*.q_proj"))
    plan = budgets(blocks, recipe)  # before anything is measured, as for a plan
    assert [bool(budget.zeros) for (budget,) in plan] == [False] * 4 + [True, False, True, False]
    model = pristine_tiny_llama
    survey = survey_of(model, TINY)
    names = [names[1:] if index == 7 else names for index, names in enumerate(survey.names)]
    found = Change().measure(Survey(survey.decoder, TINY, names, 0.5, 2, CPU, survey.room, 7, survey.structures))
    assert [index for index, change in enumerate(found) if math.isinf(change)] == [7]


@pytest.mark.parametrize(
    ("sparsity", "settings", "skip", "words"),
    [
        (0.5, {"blocks": 8}, (), "All 8 blocks would go"),
        (0.5, {"blocks": 9}, (), "Only 8 of 8 blocks could go"),
        (0.5, {"blocks": 2}, tuple(f"*.{n}.mlp.up_proj" for n in range(7)), "Only 1 of 8 blocks could go"),
        (0.99, {}, (), "All 8 blocks would go"),
    ],
)
def test_budgets_that_cannot_be(
    pristine_tiny_llama: PreTrainedModel, sparsity: float, settings: dict[str, int], skip: tuple[str, ...], words: str
) -> None:
    recipe = Recipe(sparsity=sparsity, skip=skip, allocation=Depth(**settings))
    with pytest.raises(BesaError, match=words) as refusal:
        budgets(find_blocks(pristine_tiny_llama), recipe)
    assert str(refusal.value).endswith(".")


def test_biases_go_with_a_block_and_what_is_left_is_seen() -> None:
    model = random_model(config_of("gpt2"))
    recipe = Recipe.load("depth", overrides=["allocation.blocks=1"])
    decoder = DecoderInMemory(model)
    records = prune_blocks(decoder, recipe, TOKENS).records
    (gone,) = [block for block, record in zip(decoder.blocks, records, strict=True) if record.sparsity == 1]
    assert biases(gone, gone.prunables) == [
        "attn.c_attn.bias",
        "attn.c_proj.bias",
        "mlp.c_fc.bias",
        "mlp.c_proj.bias",
    ]
    x_NTC = torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(gone(x_NTC), x_NTC)

    for family, passes in (("gpt_oss", True), ("jetmoe", False)):  # both have biases of experts; one by another name
        decoder = DecoderInMemory(random_model(config_of(family)))
        with decoder.embeddings(CPU):
            (x_NTC,) = capture_inputs(decoder.model, decoder.blocks, TOKENS.tokens_NT[:1], 1)
        with decoder.opened(decoder.blocks[0], CPU):
            assert passes_on(decoder.blocks[0], x_NTC) == passes, family
    with pytest.raises(BesaError, match="still changes its input when all of its matrices are zero"):
        prune_blocks(DecoderInMemory(random_model(config_of("jetmoe"))), recipe, TOKENS)
