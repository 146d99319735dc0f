"""The check before the work: what cannot be run block by block is refused, all else computes the same."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from besa.errors import BesaError
from besa.models.calls import hidden_states_of
from besa.models.check import Check
from besa.models.ends import capture_inputs
from besa.models.finding import find_blocks
from besa.models.source import locate
from besa.models.streaming import Decoder, DecoderInMemory, DecoderOnDisk
from tests import pretend

CPU = torch.device("cpu")
TOKENS_NT = torch.randint(3, 64, (4, 20), generator=torch.Generator().manual_seed(0))
SIZE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
DECODER = SIZE | {"num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
GEMMA4 = DECODER | {
    "head_dim": 8,
    "global_head_dim": 8,
    "layer_types": ALTERNATING,
    "sliding_window": 8,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 0,
}
GEMMA3N = DECODER | {
    "head_dim": 8,
    "layer_types": ALTERNATING,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0] * 4,
    "laurel_rank": 4,
}
XGLM = {"vocab_size": 64, "d_model": 32, "ffn_dim": 48, "num_layers": 4, "attention_heads": 4, "pad_token_id": 1}
LATENT = DECODER | {"num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1}
LATENT |= {"num_experts_per_tok": 2, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8}
LATENT |= {"qk_nope_head_dim": 8, "v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}

SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", DECODER),
    "xglm": ("XGLM", XGLM),  # the causal mask by position
    "openai-gpt": (
        "OpenAIGPT",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    ),  # lists
    "bamba": ("Bamba", DECODER | MAMBA | {"attn_layer_indices": [1, 3]}),  # the model unpacks tuples
    "gemma4": ("Gemma4Text", GEMMA4),  # a mapping that blocks write into and none reads
    "bert": ("Bert", SIZE | {"intermediate_size": 48, "is_decoder": True}),
    "mixtral": ("Mixtral", DECODER | {"num_local_experts": 4}),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "tokens": (
        "Gemma4Text",
        GEMMA4 | {"hidden_size_per_layer_input": 8},
        "the argument per_layer_input of model.layers.0 depends on the tokens, not on their number alone",
    ),
    "other blocks": (
        "Gemma4Text",
        GEMMA4 | {"num_kv_shared_layers": 2},
        "model.layers.2 looks in shared_kv_states for an entry of another block ('sliding_attention')",
    ),
    "block before": (
        "GlmMoeDsa",
        LATENT,
        "model.layers.1 gets prev_topk_indices from the block before it",
    ),
    "streams": (
        "Gemma3nText",
        GEMMA3N,
        "for (2, 16) sequences and tokens, its hidden states are (4, 2, 16, 32), not one vector for each token",
    ),
    "ahead": (
        "Bert",
        SIZE | {"intermediate_size": 48},
        "bert.encoder.layer.0 looks ahead: its output for a token depends on later tokens",
    ),
}


def random_model(name: str, settings: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def decoders(model: PreTrainedModel, folder: Path) -> list[Decoder]:
    model.save_pretrained(folder)
    return [DecoderInMemory(model), DecoderOnDisk(locate(folder))]


def see_all(decoder: Decoder, device: torch.device = CPU) -> None:
    check = Check(decoder, TOKENS_NT, device)
    for block in decoder.blocks:
        with decoder.opened(block, device):
            check.see(block)


@pytest.mark.parametrize("device", [CPU, pretend.DEVICE], ids=str)
@pytest.mark.parametrize("family", SERVED)
def test_blocks_are_the_model(family: str, device: torch.device, tmp_path: Path) -> None:
    model = random_model(*SERVED[family])
    expected: list[torch.Tensor] = []
    last = find_blocks(model)[-1].module
    handle = last.register_forward_hook(lambda _, __, output: expected.append(hidden_states_of(output)))
    model(input_ids=TOKENS_NT, use_cache=False)
    handle.remove()
    for decoder in decoders(model, tmp_path):
        see_all(decoder, device)
        with decoder.embeddings(device):
            x_NTC = torch.cat(list(capture_inputs(decoder.model, decoder.blocks, TOKENS_NT, 2)))
        for block in decoder.blocks:
            with decoder.opened(block, device):
                block.run(x_NTC, 2, into=x_NTC)
        torch.testing.assert_close(x_NTC.cpu(), expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", [CPU, pretend.DEVICE], ids=str)
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_block_by_block_is_refused(case: str, device: torch.device, tmp_path: Path) -> None:
    name, settings, reason = REFUSED[case]
    model = random_model(name, settings)
    for decoder in decoders(model, tmp_path):
        with pytest.raises(BesaError) as refusal:
            see_all(decoder, device)
        assert str(refusal.value) == f"{type(model).__name__} cannot be pruned block by block: {reason}."


def test_what_can_be_found_without_weights_is_found_before_the_first_block(tmp_path: Path) -> None:
    for case in ("tokens", "other blocks", "block before", "streams"):
        name, settings, _ = REFUSED[case]
        on_disk = decoders(random_model(name, settings), tmp_path / case)[1]
        with pytest.raises(BesaError):
            Check(on_disk, TOKENS_NT, CPU)


def test_rounding_of_a_large_residual_stream_is_no_difference() -> None:
    """In half precision, what a block adds may be less than a step of what it adds to."""
    model = random_model(*SERVED["mixtral"]).to(torch.bfloat16)
    model.model.embed_tokens.weight.mul_(1000)
    see_all(DecoderInMemory(model))


def test_the_check_leaves_model_and_randomness_as_they_were(tmp_path: Path) -> None:
    for decoder in decoders(random_model(*SERVED["mixtral"]), tmp_path):
        before, state = copy.deepcopy(decoder.model.state_dict()), torch.get_rng_state()
        see_all(decoder)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(
            tensor.is_meta or torch.equal(tensor, before[name]) for name, tensor in decoder.model.state_dict().items()
        )
        assert not any("forward" in vars(module) for module in decoder.model.modules())
        assert not any(module._forward_hooks for module in decoder.model.modules())


class Odd(nn.Module):
    """A decoder layer that does something more than the one it stands for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.calls = 0


class InPlace(Odd):
    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return hidden_states.add_(self.layer(hidden_states, **arguments))


class Counting(Odd):
    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.calls += 1
        return self.layer(hidden_states, **arguments) * (1 + 0.1 * self.calls)


class Nameless(Odd):
    def forward(self, *inputs: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return self.layer(*inputs, **arguments)


class Failing(Odd):
    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        if hidden_states.shape[1] == 11:
            raise ZeroDivisionError("eleven tokens")
        return self.layer(hidden_states, **arguments)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (InPlace, "cannot be pruned block by block: model.layers.1 changes its arguments in place."),
        (Counting, "cannot be pruned block by block: the output of model.layers.1 by itself differs by"),
        (Nameless, "Nameless takes arguments without names (*args): besa cannot call it as its model does."),
        (Failing, "block by block: it cannot be run (ZeroDivisionError: eleven tokens)."),
    ],
)
def test_a_layer_that_is_no_function_of_its_hidden_states_is_refused(kind: type[Odd], reason: str) -> None:
    model = random_model(*SERVED["llama"])
    model.model.layers[1] = kind(model.model.layers[1])
    with pytest.raises(BesaError) as refusal:
        see_all(DecoderInMemory(model))
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_happens_between_blocks_is_seen() -> None:
    model = random_model(*SERVED["llama"])
    second = model.model.layers[1]
    second.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))
    with pytest.raises(BesaError, match=r"the input of model\.layers\.1 is not the output of the block before it\.$"):
        see_all(DecoderInMemory(model))


def test_a_mean_with_an_earlier_state_is_not_the_output_of_the_block_before() -> None:
    """If blocks that stand aside returned their input, it would be."""
    model, first = random_model(*SERVED["llama"]), []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: first.append(inputs[0]))
    model.model.layers[1].register_forward_pre_hook(lambda _, inputs: ((inputs[0] + first[-1]) / 2,))
    with pytest.raises(BesaError, match=r"the input of model\.layers\.1 is not the output of the block before it\.$"):
        see_all(DecoderInMemory(model))


@pytest.mark.parametrize(("order", "named"), [((0, 1, 1, 2, 3), "0, 1, 1, 2, 3"), ((0, 2, 1, 3), "0, 2, 1, 3")])
def test_blocks_that_are_called_otherwise_than_once_in_order_are_refused(order: tuple[int, ...], named: str) -> None:
    model = random_model(*SERVED["llama"])
    decoder = DecoderInMemory(model)
    model.model.layers = nn.ModuleList([model.model.layers[place] for place in order])
    model.config.num_hidden_layers = len(order)
    with pytest.raises(BesaError, match=rf"it does not call each block once, in order, but {named}\.$"):
        see_all(decoder)


def test_blocks_that_share_a_weight_are_refused() -> None:
    model = random_model(*SERVED["llama"])
    model.model.layers[3].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    with pytest.raises(BesaError) as refusal:
        find_blocks(model)
    assert str(refusal.value) == (
        "LlamaForCausalLM cannot be pruned block by block: model.layers.1.mlp.up_proj.weight and "
        "model.layers.3.mlp.up_proj.weight are one weight."
    )


def test_a_larger_tower_of_the_same_depth_is_not_the_decoder() -> None:
    text = DECODER | {"head_dim": 8, "sliding_window": 8}
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert [block.name for block in find_blocks(model)] == [f"model.language_model.layers.{i}" for i in range(4)]
    assert isinstance(model, transformers.Gemma3ForConditionalGeneration)


def test_a_list_of_embeddings_beside_the_blocks_is_not_the_decoder() -> None:
    model = random_model(*SERVED["llama"])
    model.model.values = nn.ModuleList(nn.Embedding(64, 4096) for _ in range(4))
    assert find_blocks(model)[0].name == "model.layers.0"


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_host_waits_once_for_a_block(tmp_path: Path, on_disk: bool) -> None:
    """What all blocks have, such as masks, is compared once."""
    begun: list[int] = []
    for blocks in (2, 4):
        decoder = decoders(random_model("Llama", DECODER | {"num_hidden_layers": blocks}), tmp_path)[on_disk]
        pretend.reset()
        check = Check(decoder, TOKENS_NT, pretend.DEVICE)
        begun.append(pretend.counts.syncs.total())
        for block in decoder.blocks:
            with decoder.opened(block, pretend.DEVICE):
                pretend.reset()
                check.see(block)
                assert pretend.counts.syncs.total() == 1
    assert begun[0] == begun[1]
