"""Whether a sequence begins with the token that begins a text (BOS).

Gemma fails without this token. Llama hardly depends on it, and the pruning papers measure Llama without it. `auto`
therefore follows the model's tokenizer, except for the papers' own models, to stay comparable with published figures.
"""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from besa.errors import BesaError

PUBLISHED_WITHOUT = ("llama", "opt")  # the papers' models whose tokenizers add a BOS token


def bos_token(bos: str, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int | None:
    """The token that every sequence begins with, or None.

    Args:
        bos: ``yes``, ``no``, or ``auto``: yes if the tokenizer puts it before a text, unless the model is a Llama or
            an OPT.
        tokenizer: of the model.
        config: of the model.

    Raises:
        BesaError: `bos` is another word, or the tokenizer has no such token.
    """
    if bos not in ("auto", "yes", "no"):
        raise BesaError(f"There is no bos {bos}: choose auto, yes or no.")
    if bos == "yes" and tokenizer.bos_token_id is None:
        raise BesaError("--bos yes: the tokenizer has no token that begins a text, so choose no.")
    automatic = adds_bos(tokenizer) and config.get_text_config().model_type not in PUBLISHED_WITHOUT
    return tokenizer.bos_token_id if bos == "yes" or (bos == "auto" and automatic) else None


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its BOS token before a text by default."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
