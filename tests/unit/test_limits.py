"""How many tokens a model takes, against what it takes when it is run; and when sequences begin with a BOS token."""

import warnings

import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    BloomConfig,
    CodeGenConfig,
    CTRLConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    LlavaConfig,
    MptConfig,
    OPTConfig,
    RobertaConfig,
    XGLMConfig,
)

from besa.errors import BesaError, Notice
from besa.models.bos import adds_bos, bos_token
from besa.models.limits import Positions, embedding_rows, positions

P = 24
SMALL = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0}
GPT = SMALL | {"n_positions": P, "n_embd": 32, "n_layer": 2, "n_head": 2}
LLAMA = SMALL | {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": P}
FIXED = {
    "gpt2": (GPT2Config(**GPT), P),
    "as many tokens as positions": (GPT2Config(**GPT | {"vocab_size": P}), P),
    "gptj": (GPTJConfig(**GPT, rotary_dim=8), P),
    "codegen": (CodeGenConfig(**GPT | {"n_head": 4}, rotary_dim=8), P),
    "ctrl": (CTRLConfig(**GPT, dff=32), P),
    "opt": (
        OPTConfig(
            **SMALL, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=32,
            max_position_embeddings=P,
        ),
        P,
    ),
    "biogpt": (BioGptConfig(**{**LLAMA, "num_key_value_heads": None}), P),
    "roberta": (RobertaConfig(**LLAMA, is_decoder=True, pad_token_id=1), P - 2),
    "mpt": (MptConfig(vocab_size=40, d_model=32, n_heads=2, n_layers=2, max_seq_len=P), P),
}  # fmt: skip
COMPUTED = {
    "llama": (LlamaConfig(**LLAMA), P),
    "gemma": (GemmaConfig(**LLAMA, head_dim=16), P),
    "xglm": (
        XGLMConfig(**SMALL, d_model=32, num_layers=2, attention_heads=2, ffn_dim=32, max_position_embeddings=P),
        P,
    ),
    "bloom": (BloomConfig(**SMALL, hidden_size=32, n_layer=2, n_head=2), None),
}


def made(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def takes(model, length) -> bool:
    try:
        model(input_ids=torch.full((1, length), 3), use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", FIXED)
def test_fixed_positions_are_as_many_as_the_model_takes(name):
    config, most = FIXED[name]
    model = made(config)
    assert positions(model) == Positions(most, fixed=True)
    assert takes(model, most)
    assert not takes(model, most + 1)


@pytest.mark.parametrize("name", COMPUTED)
def test_positions_that_are_computed_go_on(name):
    config, most = COMPUTED[name]
    model = made(config)
    assert positions(model) == Positions(most, fixed=False)
    assert takes(model, 2 * P)


def test_lengths_are_held_to_the_positions():
    learned, rotary, unknown = Positions(1024, True), Positions(1024, False), Positions(None, False)
    assert [room.usual for room in (learned, rotary, unknown, Positions(4096, True))] == [1024, 1024, 2048, 2048]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert learned.checked(1024, "--seqlen") == rotary.checked(1024, "--seqlen") == []
        assert unknown.checked(10**6, "--seqlen") == []
    with pytest.raises(BesaError) as caught:
        learned.checked(1025, "--window")
    assert str(caught.value) == "--window 1025: the model has 1,024 positions, so give at most 1024."
    sentence = "--window 2048 is beyond the 1,024 positions that the model was trained for."
    with pytest.warns(Notice, match=f"^{sentence}$"):
        assert rotary.checked(2048, "--window") == [sentence]


def test_rows_of_the_embeddings():
    model = made(COMPUTED["llama"][0])
    assert embedding_rows(model) == 40
    model.resize_token_embeddings(43)
    assert embedding_rows(model) == 43


@pytest.fixture
def adding(tiny_llama_folder):
    """The tiny tokenizer as Llama's and Gemma's are: it puts its BOS token before a text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return tokenizer


def test_auto_does_as_the_tokenizer_but_not_for_the_papers_models(tiny_tokenizer, adding):
    llama, gemma, opt = COMPUTED["llama"][0], COMPUTED["gemma"][0], FIXED["opt"][0]
    assert (adds_bos(tiny_tokenizer), adds_bos(adding)) == (False, True)
    assert bos_token("auto", adding, gemma) == 0
    assert bos_token("auto", tiny_tokenizer, gemma) is None
    for config in (llama, opt, LlavaConfig(text_config=llama)):
        assert bos_token("auto", adding, config) is None
        assert bos_token("yes", adding, config) == 0
    for tokenizer in (tiny_tokenizer, adding):
        assert bos_token("yes", tokenizer, gemma) == 0
        assert bos_token("no", tokenizer, gemma) is None


def test_a_tokenizer_without_such_a_token(tiny_llama_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder, bos_token=None)
    assert bos_token("auto", tokenizer, COMPUTED["gemma"][0]) is None
    for asked, reason in (("yes", "has no token that begins a text"), ("maybe", "choose auto, yes or no")):
        with pytest.raises(BesaError, match=reason):
            bos_token(asked, tokenizer, COMPUTED["gemma"][0])
