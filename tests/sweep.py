"""Every causal decoder of transformers, built small and random, and what becomes of it: served, or refused and why."""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from besa import BesaError, Calibration, compress, load, pack, plan, unpack
from besa.models.calls import hidden_states_of
from besa.models.ends import capture_inputs
from besa.models.finding import find_blocks

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 256
MOST_PARAMETERS = 20_000_000  # of a model that counts as small
TOKENS_NT = torch.randint(3, VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(0))

# What configurations call the sizes of a model; each gets those that it knows.
WIDTHS = ("hidden_size", "d_model", "n_embd", "embedding_size", "lru_width", "word_embed_proj_dim", "emb_dim", "dim")
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads")
INNER = ("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "dim_ff", "intermediate_size_mlp")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
SMALL: dict[str, Any] = {
    **dict.fromkeys(WIDTHS, 64),
    **dict.fromkeys(DEPTHS, 4),
    **dict.fromkeys(HEADS, 4),
    **dict.fromkeys(INNER, 96),
    **dict.fromkeys(EXPERTS, 4),
    **dict.fromkeys(CHOSEN, 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "rotary_dim": 8,
    "sliding_window": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_expand": 2,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "mamba_d_ssm": 128,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "n_mamba_heads": 1,
    "n_groups": 1,
    "ssm_state_size": 8,
    "use_mamba_kernels": False,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 2,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.0] * 4,
    "is_decoder": True,
    # Towers for images and sound.
    "depth": 2,
    "image_size": 32,
    "patch_size": 8,
    "out_hidden_size": 64,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
ROTARY = {"rope_type": "default", "rope_theta": 10_000.0}
# What some families need besides, or instead.
OWN: dict[str, dict[str, Any]] = {
    "axk2": {"num_key_value_heads": 4},
    "cohere_compass_text": {"layer_types": ALTERNATING, "rope_parameters": dict.fromkeys(ALTERNATING, ROTARY)},
    "deepseek_v32": {"num_key_value_heads": 4},
    "gemma4": {"text_config": {"layer_types": ALTERNATING}},
    "gemma4_text": {"layer_types": ALTERNATING},
    "gemma4_unified": {"text_config": {"layer_types": ALTERNATING}},
    "gemma4_unified_text": {"layer_types": ALTERNATING},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "kimi_linear": {"num_hidden_layers": 2},  # its delta attention takes seconds on a CPU
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "reformer": {"axial_pos_embds": False, "attention_head_size": 16, "feed_forward_size": 96, "num_buckets": 4},
    "xmod": {"default_language": "en_XX"},
    "youtu": {"pad_token_id": None},  # transformers loads zeros for the token of padding, whatever the file has
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True)
class Outcome:
    """What became of a family: ``served``, ``refused`` or ``not built``, and why."""

    family: str
    kind: str
    why: str = ""


def parameters_of(kind: type[PreTrainedConfig]) -> set[str]:
    return set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__annotations__", {}))


def small_settings(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """Small sizes under whatever names a configuration has for them, and those of its parts."""
    settings = {name: SMALL[name] for name in SMALL.keys() & parameters_of(kind)}
    for name, part in kind.sub_configs.items():
        if getattr(part, "model_type", ""):  # none: a part of any family
            settings[name] = small_settings(part)
    return settings


def small_model(family: str) -> PreTrainedModel:
    """A random model of the family; the first forward pass of its own is part of building it.

    Raises:
        Exception: whatever the family's own code raises where small sizes do not suffice.
    """
    settings = small_settings(CONFIG_MAPPING[family])
    for name, value in OWN.get(family, {}).items():
        settings[name] = settings.get(name, {}) | value if isinstance(value, dict) else value
    config = CONFIG_MAPPING[family](**settings)
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:,.0f} million parameters at the least sizes that are known")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model(input_ids=TOKENS_NT, use_cache=False)
    return model


def outcome(family: str, folder: Path, tokenizer: PreTrainedTokenizerBase, recipe: str = "wanda") -> Outcome:
    """Prune a family from disk to disk, and compare its blocks with the model's own forward pass.

    Raises:
        Exception: anything but a refusal, or a wrong result.
    """
    try:
        model = small_model(family)
        model.save_pretrained(folder / "dense")
    except Exception as error:
        return Outcome(family, "not built", f"{type(error).__name__}: {' '.join(str(error).split())}"[:160])
    calibration = Calibration(TOKENS_NT, "random", 0)
    planned = None
    with suppress(BesaError):  # what is refused later may have a plan; what is served has one
        planned = plan(folder / "dense", recipe, samples=len(TOKENS_NT), seqlen=TOKENS_NT.shape[1])
    try:
        result = compress(folder / "dense", recipe, calibration, out=folder / "out", batch=2, tokenizer=tokenizer)
    except BesaError as refusal:
        return Outcome(family, "refused", str(refusal).replace(str(folder / "dense"), "FOLDER"))
    compare(model)
    assert planned and result.record.zeros == planned.zeros == round(0.5 * result.record.weights)
    blocks = find_blocks(result.model)
    counted = [int((block.weight(name) == 0).sum()) for block in blocks for name in block.prunables]
    assert sum(counted) == result.record.zeros
    assert result.model(input_ids=TOKENS_NT, use_cache=False).logits.isfinite().all()
    return Outcome(family, "served")


@torch.no_grad()
def compare(model: PreTrainedModel) -> None:
    """What besa's blocks put out, two sequences at a time and alone, is what the model's own put out."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    blocks, outputs = find_blocks(model), [[] for _ in find_blocks(model)]
    handles = [
        block.module.register_forward_hook(lambda _, __, y, own=own: own.append(hidden_states_of(y)))
        for block, own in zip(blocks, outputs, strict=True)
    ]
    for part_NT in TOKENS_NT.split(2):
        model(input_ids=part_NT, use_cache=False)
    for handle in handles:
        handle.remove()
    x_NTC = torch.cat(list(capture_inputs(model, blocks, TOKENS_NT, 2, {12})))
    for block, own in zip(blocks, outputs, strict=True):
        y_NTC = x_NTC.clone()
        block.run(y_NTC, 2, into=y_NTC)
        close(y_NTC, torch.cat(own))
        close(block(x_NTC[3:4]), y_NTC[3:4])
        beginning_NT = (block(x_NTC[:2, :12]) - y_NTC[:2, :12]).norm(dim=-1) / y_NTC[:2, :12].norm(dim=-1)
        assert float(beginning_NT.median()) < 1e-4  # of some, rounding may change which experts or tokens are chosen
        x_NTC = y_NTC


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < 1e-4


@torch.inference_mode()
def packed(family: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Pack a family, half of whose weights are zero, and compare it with the dense one: prompts, and token by token.

    Returns:
        whether it was packed; besa refuses what it does not serve, and what has no linears to pack.

    Raises:
        Exception: anything but a refusal, or a wrong result.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        model = small_model(family)
        for block in find_blocks(model):
            for name in block.prunables:
                weight = block.weight(name)
                weight *= torch.rand(weight.shape, generator=generator) > 0.5
        model.save_pretrained(folder / "dense")
    except Exception:  # as of `outcome`, which says why
        return False
    tokenizer.save_pretrained(folder / "dense")
    try:
        pack(folder / "dense", folder / "packed")
    except BesaError:
        return False
    coded = folder / "coded"
    with suppress(BesaError):  # some heads stay as they are
        pack(folder / "dense", coded, head="int8")
    model = AutoModelForCausalLM.from_pretrained(folder / "dense").eval()  # which may differ from what was saved
    other = load(folder / "packed")
    pairs = [(other, model)]
    if coded.exists():
        unpack(coded, folder / "rounded")
        pairs.append((load(coded), AutoModelForCausalLM.from_pretrained(folder / "rounded").eval()))
    for found, expected in pairs:
        if expected._can_set_experts_implementation():
            expected.set_experts_implementation("eager")
        for tokens_NT in (TOKENS_NT[:2], TOKENS_NT[:1]):
            close(*(each(input_ids=tokens_NT, use_cache=False).logits for each in (found, expected)))
        assert (found.dtype, found.device) == (expected.dtype, expected.device)
    try:
        expected = decoded(model)
    except Exception:  # of a family's own code for such sizes
        return True
    for found, own in zip(decoded(other), expected, strict=True):
        close(found, own)
    return True


def decoded(model: PreTrainedModel) -> list[torch.Tensor]:
    """Logits of a few tokens, one after the other, after a prompt; those of the prompt if the model keeps no cache."""
    found = [model(input_ids=TOKENS_NT[:1, :7], use_cache=True)]
    for place in range(7, 12):
        if (past := found[-1].get("past_key_values")) is not None:
            found.append(model(input_ids=TOKENS_NT[:1, place : place + 1], past_key_values=past, use_cache=True))
    return [each.logits for each in found]
