"""Decoder families: a tiny random model of each is pruned, and docs/models.md says what is in their blocks.

The table of docs/models.md is made here: after a change, run this file with BESA_UPDATE_DOCS=1.
"""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from besa import BesaError, Calibration, compress
from besa.errors import Interrupted
from besa.methods.recipe import Recipe
from besa.models.finding import find_blocks, left_dense
from tests.prunable_weights import prunable_weights
from tests.slowly import some_slow

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
TABLE = re.compile(r"^\| family .*?(?=^\n|\Z)", re.DOTALL | re.MULTILINE)
VOCABULARY = 512

SIZE = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2}
DECODER = SIZE | {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
HEADS_OF_16 = DECODER | {"head_dim": 16}
GPT = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS_4 = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS_4 = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", DECODER),
    "mistral": ("Mistral", DECODER | {"sliding_window": 8}),
    "qwen2": ("Qwen2", DECODER),
    "qwen3": ("Qwen3", HEADS_OF_16),
    "gemma2": ("Gemma2", HEADS_OF_16 | {"sliding_window": 8}),
    "gemma3": ("Gemma3Text", HEADS_OF_16 | SLIDING),
    "phi3": ("Phi3", DECODER | {"pad_token_id": 0}),
    "gpt2": ("GPT2", GPT),
    "gpt_neox": ("GPTNeoX", SIZE | {"num_attention_heads": 4, "intermediate_size": 96}),
    "opt": ("OPT", SIZE | {"num_attention_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "falcon": ("Falcon", SIZE | {"num_attention_heads": 4}),
    "bloom": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "starcoder2": ("Starcoder2", DECODER),
    "olmo2": ("Olmo2", DECODER),
    "stablelm": ("StableLm", DECODER),
    "mixtral": ("Mixtral", DECODER | EXPERTS_4),
    "qwen3_moe": ("Qwen3Moe", HEADS_OF_16 | QWEN_EXPERTS_4),
    "deepseek_v3": ("DeepseekV3", SIZE | LATENT),
    "granitemoe": ("GraniteMoe", DECODER | EXPERTS_4),
    "gpt_oss": ("GptOss", HEADS_OF_16 | EXPERTS_4 | SLIDING),
    "gemma": ("Gemma", HEADS_OF_16),
    "phi": ("Phi", SIZE | {"num_attention_heads": 4, "intermediate_size": 96}),
    "gptj": ("GPTJ", GPT | {"rotary_dim": 8}),
    "gpt_neo": (
        "GPTNeo",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 96,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
    ),
    "falcon_new": (
        "Falcon",
        SIZE | {"num_attention_heads": 4, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "mpt": ("Mpt", {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "olmo": ("Olmo", DECODER),
    "cohere": ("Cohere", DECODER),
    "granite": ("Granite", DECODER),
    "glm4": ("Glm4", HEADS_OF_16 | {"pad_token_id": 0}),
    "smollm3": ("SmolLM3", DECODER | {"pad_token_id": 0}),
    "nemotron": ("Nemotron", DECODER),
    "qwen2_moe": ("Qwen2Moe", DECODER | QWEN_EXPERTS_4 | {"shared_expert_intermediate_size": 48}),
    "olmoe": ("Olmoe", DECODER | {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v2": ("DeepseekV2", SIZE | LATENT),
    "phimoe": ("Phimoe", DECODER | EXPERTS_4),
    "jetmoe": ("JetMoe", SIZE | EXPERTS_4 | {"num_key_value_heads": 2, "kv_channels": 16, "intermediate_size": 96}),
    "llama4": ("Llama4Text", HEADS_OF_16 | EXPERTS_4 | {"intermediate_size_mlp": 96, "num_experts_per_tok": 1}),
    "qwen3_next": (
        "Qwen3Next",
        HEADS_OF_16
        | QWEN_EXPERTS_4
        | {
            "shared_expert_intermediate_size": 48,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "jamba": (
        "Jamba",
        DECODER
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
}
LIKE_OTHERS = {  # their linears and experts have no form that none of the others has
    "cohere", "deepseek_v2", "falcon", "falcon_new", "gemma", "gemma2", "glm4", "gpt_neo", "gpt_neox", "gptj",
    "granite", "granitemoe", "mistral", "nemotron", "olmo", "olmo2", "olmoe", "opt", "phi", "phimoe", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip
TOKENS = Calibration(torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0)), "random", 0)


def config_of(family: str, **changes: Any) -> transformers.PreTrainedConfig:
    name, settings = FAMILIES[family]
    return getattr(transformers, f"{name}Config")(**settings | changes)


def random_model(config: transformers.PreTrainedConfig) -> PreTrainedModel:
    """Every floating-point tensor is random, norms, biases and buffers too: what is lost on the way is seen."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.02 * torch.randn_like(tensor)
    return model


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def config_of_loaded(model: PreTrainedModel) -> dict[str, Any]:
    """Less where it was loaded from, and the one key that besa adds."""
    return {key: value for key, value in model.config.to_dict().items() if key not in ("_name_or_path", "besa")}


def different(before: PreTrainedModel, after: PreTrainedModel) -> set[str]:
    """Names of the tensors, buffers included, that are not bit for bit the same."""
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    return {
        name for name, tensor in old.items() if tensor.dtype != new[name].dtype or not torch.equal(tensor, new[name])
    }


def prunable_parameters(model: PreTrainedModel) -> set[str]:
    return {
        f"{block.name}.{prunable.parameter}" for block in find_blocks(model) for prunable in block.prunables.values()
    }


def stopped_after_a_block(done: int, _: int, state: str) -> None:
    if done == 1:
        raise KeyboardInterrupt


@pytest.mark.parametrize("family", some_slow(FAMILIES, LIKE_OTHERS))
def test_family(family: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    folder = saved(random_model(config_of(family)), tmp_path / "dense")
    dense = load(folder)
    pruned = {}
    for name, sparsity, few_steps in [("wanda", 0.0, []), ("wanda", 0.5, []), ("besa", 0.5, ["allocation.steps=8"])]:
        out, recipe = tmp_path / f"{name}-{sparsity}", Recipe.load(name, sparsity, few_steps)
        if sparsity and name == "wanda":
            with pytest.raises((KeyboardInterrupt, Interrupted)):
                compress(folder, recipe, TOKENS, out=out, tokenizer=tiny_tokenizer, progress=stopped_after_a_block)
        compress(folder, recipe, TOKENS, out=out, tokenizer=tiny_tokenizer, resume=True)
        pruned[name, sparsity] = load(out)
        assert config_of_loaded(pruned[name, sparsity]) == config_of_loaded(dense)
    assert different(dense, pruned["wanda", 0.0]) == set()

    model = pruned["besa", 0.5]
    matrices = [block.weight(name) for block in find_blocks(model) for name in block.prunables]
    assert sum(int((w_OI == 0).sum()) for w_OI in matrices) == round(0.5 * sum(w_OI.numel() for w_OI in matrices))
    assert different(dense, model) == prunable_parameters(dense)
    was, now = dense.state_dict(), model.state_dict()
    for name in prunable_parameters(dense):
        assert torch.equal(was[name] * (now[name] != 0), now[name])
    with torch.no_grad():
        assert bool(model(TOKENS.tokens_NT, use_cache=False).logits.isfinite().all())

    # Loaded whole, and from the disk with a stop after the first block.
    in_memory = load(folder)
    compress(in_memory, "wanda", TOKENS, sparsity=0.5, tokenizer=tiny_tokenizer)
    assert different(in_memory, pruned["wanda", 0.5]) == set()


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v3", "gpt_oss"])
def test_bfloat16_files_stay_what_they_are(family: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    folder = saved(random_model(config_of(family)).to(torch.bfloat16), tmp_path / "dense")
    compress(folder, "wanda", TOKENS, out=tmp_path / "out", sparsity=0, tokenizer=tiny_tokenizer)
    before, after = load(folder), load(tmp_path / "out")
    assert before.dtype == torch.bfloat16
    assert different(before, after) == set()
    assert config_of_loaded(after) == config_of_loaded(before)


def test_statistics_from_a_share_of_the_sequences_are_of_all_where_there_are_experts(tiny_tokenizer: Any) -> None:
    """One sequence may not reach an expert that others reach, and it would be pruned by its weights alone."""
    for family, same in (("qwen3_moe", True), ("llama", False)):
        pruned = []
        for every in (1, 1000):
            model = random_model(config_of(family))
            recipe = Recipe.load("wanda", 0.5, [f"importance.statistics_every={every}"])
            compress(model, recipe, TOKENS, tokenizer=tiny_tokenizer)
            pruned.append(model)
        assert (different(*pruned) == set()) == same, family


@pytest.mark.parametrize("recipe", ["wanda", "sparsegpt"])
def test_experts_no_token_reached_are_reported_and_pruned_by_magnitude(
    recipe: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    dense = random_model(config_of("qwen3_moe", num_experts=16))
    folder = saved(dense, tmp_path / "dense")
    few = Calibration(TOKENS.tokens_NT[:1, :3], "random", 0)
    record = compress(folder, recipe, few, out=tmp_path / "out", tokenizer=tiny_tokenizer).record
    model = load(tmp_path / "out")
    linears = [linear for block in record.blocks for linear in block.linears]
    missed = [linear.name for linear in linears if not linear.reached]
    # 3 tokens reach 6 of 16 experts in each of 2 blocks at most; each expert is two matrices.
    assert 2 * 2 * 10 <= record.unreached < 2 * 2 * 16
    assert record.unreached == len(missed)
    assert all(".experts." in name for name in missed)
    assert record.zeros == round(0.5 * record.weights)
    before = {name: block.weight(name) for block in find_blocks(dense) for name in block.prunables}
    after = {name: block.weight(name) for block in find_blocks(model) for name in block.prunables}
    for linear in linears:
        w_OI, zero_OI = before[linear.name].abs(), after[linear.name] == 0
        assert linear.zeros == int(zero_OI.sum()) == w_OI.numel() // 2
        by_magnitude = bool((w_OI.where(zero_OI, 0).amax(1) <= w_OI.where(~zero_OI, torch.inf).amin(1)).all())
        assert by_magnitude == (not linear.reached), linear.name
        unmoved = torch.equal(after[linear.name], before[linear.name].where(~zero_OI, 0))
        assert unmoved == (recipe == "wanda" or not linear.reached), linear.name


def test_transposed_experts_are_pruned_along_their_inputs(tiny_tokenizer: Any, tmp_path: Path) -> None:
    dense = random_model(config_of("gpt_oss"))
    folder = saved(dense, tmp_path / "dense")
    model = compress(folder, "wanda", TOKENS, out=tmp_path / "out", tokenizer=tiny_tokenizer).model
    experts = dense.model.layers[0].mlp.experts
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    experts.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0], inputs[1])))
    dense(TOKENS.tokens_NT, use_cache=False)
    x_TI, chosen_TK = seen[0][0].reshape(-1, 64).double(), seen[0][1].reshape(-1, 2)
    assert chosen_TK.shape[0] == x_TI.shape[0] == 64
    for expert in range(4):
        norm_I = x_TI[(chosen_TK == expert).any(dim=1)].norm(dim=0)
        w_IO = experts.gate_up_proj[expert]
        assert w_IO.shape == (64, 2 * 96)  # stored the other way round than nn.Linear's
        importance_OI = w_IO.T.abs().double() * norm_I
        kept_OI = model.model.layers[0].mlp.experts.gate_up_proj[expert].T != 0
        wanted_OI = importance_OI.argsort(dim=1).argsort(dim=1) >= 32
        assert torch.equal(kept_OI, wanted_OI)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        (
            "Mamba",
            SIZE,
            "is a mamba model, which has no attention (state-space or recurrent): besa prunes causal decoders.",
        ),
        (
            "T5",
            {"vocab_size": VOCABULARY, "d_model": 64, "num_layers": 2, "num_heads": 4, "d_ff": 96},
            "is a t5 model, an encoder-decoder: besa prunes causal decoders.",
        ),
    ],
)
def test_what_is_no_attention_decoder_is_refused(
    name: str, settings: dict[str, Any], words: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    config = getattr(transformers, f"{name}Config")(**settings)
    kind = "T5ForConditionalGeneration" if name == "T5" else "MambaForCausalLM"
    folder = saved(getattr(transformers, kind)(config), tmp_path / "dense")
    with pytest.raises(BesaError) as refusal:
        compress(folder, "wanda", TOKENS, out=tmp_path / "out", tokenizer=tiny_tokenizer)
    assert str(refusal.value) == f"{folder} {words}"
    assert words in DOCS.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def table() -> str:
    """What is in the blocks of each family, in Markdown."""
    lines = ["| family | class | prunable | stays dense besides norms and biases | experts |", "|---|---|---|---|---|"]
    for family in sorted(FAMILIES):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_of(family))
        blocks = find_blocks(model)
        whole = sum(parameter.numel() for block in blocks for parameter in block.module.parameters())
        dense = left_dense(blocks, {name for block in blocks for name in block.prunables})
        experts = any(prunable.expert is not None for block in blocks for prunable in block.prunables.values())
        share = sum(map(prunable_weights, blocks)) / whole
        names = ", ".join(f"`{name}`" for name in sorted(dense)) or "nothing"
        lines.append(f"| {family} | `{type(model).__name__}` | {share:.1%} | {names} | {'yes' if experts else 'no'} |")
    return "\n".join(lines) + "\n"


def test_docs_list_the_families() -> None:
    text, wanted = DOCS.read_text(), table()
    if os.environ.get("BESA_UPDATE_DOCS"):
        DOCS.write_text(TABLE.sub(lambda _: wanted, text))
        text = DOCS.read_text()
    found = TABLE.search(text)
    assert found and found[0] == wanted, (
        "docs/models.md is out of date: run `BESA_UPDATE_DOCS=1 pytest tests/integration/test_families.py -k docs`"
    )
