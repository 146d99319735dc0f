"""Generating text from a prompt, passed on word by word."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from besa.data.arguments import Count, Dtype, checked
from besa.data.seeds import check_seed
from besa.errors import BesaError
from besa.models.borrowing import borrowed, tokenizer_of_caller
from besa.models.limits import positions
from besa.models.loading import load_tokenizer, locate
from besa.progress import Progress, silent
from besa.runtime.sparse_models import load_source
from besa.system.devices import resolve_device


@checked
def generate(
    model: str | Path | PreTrainedModel,
    prompt: str,
    *,
    max_new_tokens: Count = 128,
    temperature: float = 0.0,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    tell: Callable[[str], None] | None = None,
    progress: Progress = silent,
) -> str:
    """Continue a text.

    Args:
        model: anything `besa.load` takes, or a loaded model.
        prompt: the text to continue, without a chat template.
        max_new_tokens: at most; the model may end sooner, and ends when it has no more positions.
        temperature: of the softmax that tokens are sampled from; 0 takes the likeliest token each time.
        seed: of the sampling.
        tokenizer: needed with a loaded model; otherwise the model's own.
        device: as in `besa.load`.
        dtype: as in `besa.load`.
        trust_remote_code: as in `besa.load`.
        tell: called with each word as soon as it is complete.
        progress: told about a download.

    Returns:
        The continuation, without the prompt.

    Raises:
        BesaError: the model cannot be read, the prompt is empty or longer than the model's positions, a number is
            invalid, or a loaded model came without its tokenizer.
    """
    check_seed(seed)
    if not 0 <= temperature < math.inf:
        raise BesaError(f"There is no temperature {temperature}: use 0 or a positive number.")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise BesaError("The prompt holds half a surrogate pair, which is no character: remove it.") from None
    if not isinstance(model, PreTrainedModel):
        source = locate(model, progress, trust_remote_code=trust_remote_code).local()
        tokenizer = tokenizer or load_tokenizer(source)
        model = load_source(source, resolve_device(device), dtype)
    else:
        tokenizer = tokenizer_of_caller(tokenizer)
    if not isinstance(model, GenerationMixin):
        raise BesaError(f"{type(model).__name__} cannot generate text, because its code is no GenerationMixin.")
    tokens_1T = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    if tokens_1T.numel() == 0:
        raise BesaError("The prompt is empty: give at least one word to go on from.")
    room = (positions(model).most or sys.maxsize) - tokens_1T.shape[1]
    if room < 1:
        raise BesaError(f"The prompt has {tokens_1T.shape[1]:,} tokens, so the model has no position left: shorten it.")
    sampling = (
        {"do_sample": True, "logits_processor": [_Tempered(temperature)]} if temperature else {"do_sample": False}
    )
    others = [model.device] if model.device.type != "cpu" else []
    with borrowed(model), torch.random.fork_rng(others, device_type=model.device.type):
        torch.manual_seed(seed)
        made_1T = model.generate(
            tokens_1T,
            attention_mask=torch.ones_like(tokens_1T),
            max_new_tokens=min(max_new_tokens, room),
            streamer=_Telling(tokenizer, tell) if tell else None,
            temperature=None,  # `_Tempered` applies it; this also switches off that of the checkpoint
            **sampling,
        )
    return str(tokenizer.decode(made_1T[0, tokens_1T.shape[1] :], skip_special_tokens=True))


class _Tempered(LogitsProcessor):  # type: ignore[misc]
    """Logits divided by any temperature; differences to the largest in double precision do not overflow."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores_NV: Tensor) -> Tensor:
        distances_NV = scores_NV.double() - scores_NV.double().amax(dim=-1, keepdim=True)
        return distances_NV / self._temperature


class _Telling(TextStreamer):  # type: ignore[misc]
    """transformers' way of joining tokens to words, without its printing."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._tell = tell

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on a complete word."""
        if text:
            self._tell(text)
