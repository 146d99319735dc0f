"""What no token reaches, or what is multiplied out of sight, is refused by name; experts alone go by magnitude."""

import copy
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from besa import BesaError, Calibration, compress
from besa.methods.recipe import Recipe
from besa.models.finding import find_blocks

TOKENS = Calibration(torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(0)), "random", 0)
SMALL = {"vocab_size": 64, "pad_token_id": 0}
BART = transformers.BartConfig(
    **SMALL, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, max_position_embeddings=64
)
RECURRENT_GEMMA = transformers.RecurrentGemmaConfig(
    **SMALL,
    hidden_size=32,
    lru_width=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=1,
    intermediate_size=48,
)
LLAMA = transformers.LlamaConfig(
    **SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
)


def random_model(config: transformers.PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def pruned(model: PreTrainedModel, tokenizer: Any, *skip: str) -> PreTrainedModel:
    recipe = Recipe.load("wanda").model_copy(update={"skip": skip})
    return compress(model, recipe, TOKENS, tokenizer=tokenizer).model


@pytest.mark.parametrize(
    ("config", "words", "skip"),
    [
        (
            BART,
            "No token reaches model.decoder.layers.0.encoder_attn.k_proj and 3 more, ",
            [f"model.decoder.layers.*.encoder_attn.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj")],
        ),
        (
            RECURRENT_GEMMA,  # stored inputs first, which no shape tells of a square
            "No token reaches model.layers.0.temporal_block.rg_lru.input_gate_weight.0 and 7 more, ",
            [f"model.layers.*.temporal_block.rg_lru.{name}_gate_weight.*" for name in ("input", "recurrent")],
        ),
    ],
    ids=["unreached", "turned"],
)
def test_a_matrix_that_besa_cannot_judge_is_refused_and_can_be_left_out(
    config: transformers.PreTrainedConfig, words: str, skip: list[str], tiny_tokenizer: Any
) -> None:
    model = random_model(config)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BesaError) as refusal:
        pruned(model, tiny_tokenizer)
    assert str(refusal.value).startswith(words)
    patterns = " ".join(f"--skip '{pattern}'" for pattern in skip)
    assert str(refusal.value).endswith(f": take {patterns} to leave such matrices dense.")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for block in find_blocks(pruned(model, tiny_tokenizer, *skip)):
        for name in block.prunables:
            zeros = float((block.weight(name) == 0).float().mean())
            assert zeros == (0 if any(fnmatch(name, pattern) for pattern in skip) else 0.5)


class Hidden(nn.Module):
    """A linear that multiplies by a copy of its weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.inner = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.inner.weight.clone().T


def test_a_product_out_of_sight_is_refused(tiny_tokenizer: Any) -> None:
    model = random_model(LLAMA)
    model.model.layers[1].mlp.up_proj = Hidden(model.model.layers[1].mlp.up_proj)
    with pytest.raises(
        BesaError,
        match=r"^No token reaches model\.layers\.1\.mlp\.up_proj\.inner, .*up_proj\.inner' to leave .*\.$",
    ):
        pruned(model, tiny_tokenizer)


class Named(Hidden):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input=x, weight=self.inner.weight)


def test_a_product_by_names_is_as_good_as_one_by_position(tiny_tokenizer: Any) -> None:
    model, other = random_model(LLAMA), random_model(LLAMA)
    for layer in model.model.layers:
        layer.mlp.up_proj = Named(layer.mlp.up_proj)
    pruned(model, tiny_tokenizer)
    pruned(other, tiny_tokenizer)
    for own, expected in zip(model.model.layers, other.model.layers, strict=True):
        assert torch.equal(own.mlp.up_proj.inner.weight, expected.mlp.up_proj.weight)


class Mixture(nn.Module):
    """Two of four experts for each token, computed one by one.

    Args:
        learns: whether the experts are in the backward pass; code that comes with models leaves them out.
    """

    def __init__(self, learns: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(LLAMA) for _ in range(4))
        self.learns = learns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.gate(x).softmax(dim=-1).topk(2)
        y = torch.zeros_like(x)
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            for number, expert in enumerate(self.experts):
                *places, rank = (chosen == number).nonzero(as_tuple=True)
                y = y.index_put(tuple(places), expert(x[tuple(places)]) * weights[*places, rank, None], accumulate=True)
        return y


class OfPictures(nn.Module):
    """A mixture for text beside one that only pictures would reach."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.vision = Mixture(), Mixture()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.text(x)
        return y


def with_mixtures(make: Callable[[], nn.Module]) -> PreTrainedModel:
    model = random_model(LLAMA)
    for layer in model.model.layers:
        layer.mlp = make()
    return model.requires_grad_(False)


def test_a_mixture_that_no_token_reaches_is_refused_and_can_be_left_out(tiny_tokenizer: Any) -> None:
    parts = ("gate", "up", "down")
    patterns = " ".join(f"--skip 'model.layers.*.mlp.vision.experts.*.{part}_proj'" for part in parts)
    with pytest.raises(BesaError) as refusal:
        pruned(with_mixtures(OfPictures), tiny_tokenizer)
    assert str(refusal.value).startswith("No token reaches model.layers.0.mlp.vision.experts.0.gate_proj and 11 more, ")
    assert str(refusal.value).endswith(f": take {patterns} to leave such matrices dense.")
    model = pruned(with_mixtures(OfPictures), tiny_tokenizer, "*.vision.*")
    assert bool(model.model.layers[1].mlp.vision.experts[2].up_proj.weight.all())
    assert not bool(model.model.layers[1].mlp.text.experts[2].up_proj.weight.all())


def test_experts_without_gradients_are_refused_where_gradients_decide(tiny_tokenizer: Any) -> None:
    for learns, recipe in ((True, "fast"), (False, "wanda")):
        compress(with_mixtures(partial(Mixture, learns)), recipe, TOKENS, tokenizer=tiny_tokenizer)
    told = r"The model's own code computes model\.layers\.1\.mlp\.experts\.\d\.gate_proj without gradients, which"
    with pytest.raises(BesaError, match=told):
        compress(with_mixtures(partial(Mixture, False)), "fast", TOKENS, tokenizer=tiny_tokenizer)


@pytest.mark.parametrize(("name", "change"), [("besa", ()), ("wanda", ("finetune.method=adam",))])
def test_experts_without_gradients_are_refused_where_gradients_teach(
    name: str, change: tuple[str, ...], tiny_tokenizer: Any
) -> None:
    recipe = Recipe.load(name, overrides=change)
    told = r"The model's own code computes model\.layers\.0\.mlp\.experts\.\d\.gate_proj without gradients, which"
    with pytest.raises(BesaError, match=told):
        compress(with_mixtures(partial(Mixture, False)), recipe, TOKENS, tokenizer=tiny_tokenizer)


def test_linears_that_learn_from_their_own_outputs_need_no_gradients_of_experts(tiny_tokenizer: Any) -> None:
    recipe = Recipe.load("besa", overrides=["allocation.granularity=linear", "allocation.autocast=false"])
    compress(with_mixtures(partial(Mixture, False)), recipe, TOKENS, tokenizer=tiny_tokenizer)


class Idle(Mixture):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_experts_of_one_block_do_not_vouch_for_those_of_the_next(tiny_tokenizer: Any) -> None:
    model = with_mixtures(Mixture)
    model.model.layers[1].mlp = Idle().requires_grad_(False)
    recipe = Recipe.load("besa", overrides=["allocation.granularity=two-blocks"])
    with pytest.raises(
        BesaError, match=r"^No token reaches model\.layers\.1\.mlp\.experts\.0\.gate_proj and 11 more, "
    ):
        compress(model, recipe, TOKENS, tokenizer=tiny_tokenizer)


def test_a_model_without_a_head_is_refused_where_predictions_decide(tiny_tokenizer: Any) -> None:
    compress(random_model(LLAMA).model, "wanda", TOKENS, tokenizer=tiny_tokenizer)
    for recipe in ("fast", "best"):
        with pytest.raises(BesaError, match=f"Recipe {recipe} needs predictions, and LlamaModel has no head"):
            compress(random_model(LLAMA).model, recipe, TOKENS, tokenizer=tiny_tokenizer)


def test_routers_may_be_asked_for_their_logits(tiny_tokenizer: Any) -> None:
    """Configurations that were fine-tuned with a loss on routers say so, and the head would look for them."""
    found = []
    for asks in (False, True):
        config = transformers.MixtralConfig(
            **SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            num_key_value_heads=2, num_local_experts=4, output_router_logits=asks,
        )  # fmt: skip
        model = random_model(config)
        compress(model, "fast", TOKENS, tokenizer=tiny_tokenizer)
        assert model.config.output_router_logits == asks
        found.append(model.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
