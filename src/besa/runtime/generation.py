"""Text generation, word by word: continuations of a text, or answers in a chat."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.utils import GENERATION_CONFIG_NAME

from besa.counting.precision import widest
from besa.data.arguments import Count, Dtype, checked
from besa.data.seeds import check_seed
from besa.data.tokens import check_known
from besa.errors import BesaError
from besa.models.borrowing import borrowed, check_dtype_of_caller, check_memory_of_caller, tokenizer_of_caller
from besa.models.limits import embedding_rows, positions
from besa.models.loading import load_tokenizer
from besa.models.source import locate
from besa.progress import Progress, silent
from besa.runtime.chat_template import check_chat, message, prompt_of
from besa.runtime.sparse_models import load_source
from besa.system.devices import resolve_device

CONTINUATION, ANSWER = 128, 1024  # default tokens at most
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # settings of a generation config that always hold
LIMITS = {  # settings that hold when tokens are sampled, each with its smallest and largest value
    "top_k": (0, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (sys.float_info.min, math.inf),
}


@checked
def generate(
    model: str | Path | PreTrainedModel,
    prompt: str,
    *,
    chat: bool | None = None,
    system: str | None = None,
    max_new_tokens: Count | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: bool = False,
    tell: Callable[[str], None] | None = None,
    progress: Progress = silent,
) -> str:
    """Answer a question, or continue a text.

    Args:
        model: anything `besa.load` takes, or a loaded model.
        prompt: the question, or the text to continue.
        chat: put the prompt into the tokenizer's chat template, so that an instruct model answers it; False continues
            the prompt as a text. By default, whatever the tokenizer is made for: a chat if it has a template.
        system: instructions that the chat begins with, instead of the template's own.
        max_new_tokens: at most; the model may end sooner, and ends when it has no more positions. Default: 1024 in a
            chat, else 128.
        temperature: of the softmax that tokens are sampled from; 0 always takes the most likely token. From the
            checkpoint's generation config only the special tokens (`TOKENS`) are used and, when sampling, the settings
            in `LIMITS`.
        seed: of the sampling.
        tokenizer: needed with a loaded model; otherwise the model's own.
        device: as in `besa.load`. A loaded model stays where it is by default; else the whole model is there meanwhile.
        dtype: as in `besa.load`; a loaded model keeps its own.
        trust_remote_code: as in `besa.load`.
        tell: called with each word as soon as it is complete.
        progress: told about a download.

    Returns:
        The answer or the continuation, without the prompt.

    Raises:
        BesaError: the model cannot be read, the prompt is empty or longer than the model's positions, a number is
            invalid, a loaded model came without its tokenizer or weights or has another dtype, or the tokenizer has no
            chat template, or none that takes a system prompt; or an output of the model is NaN or infinite.
    """
    check_text(prompt, "prompt")
    writer, chat = open_writer(
        model,
        chat=chat,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    return answer(writer, chat, prompt, system, tell)


def answer(
    writer: Writer, chat: bool, prompt: str, system: str | None = None, tell: Callable[[str], None] | None = None
) -> str:
    """The answer or the continuation of a writer; arguments and errors as of `generate`."""
    if chat:
        beginning = [] if system is None else [message("system", system)]
        tokens_1T = prompt_of(writer.tokenizer, [*beginning, message("user", prompt)])
    else:
        tokens_1T = writer.tokenizer(prompt, return_tensors="pt")["input_ids"]
    if tokens_1T.numel() == 0 or (chat and not prompt.strip()):
        raise BesaError("The prompt is empty: give at least one word to go on from.")
    return writer.write(tokens_1T, tell).text


def open_writer(
    model: str | Path | PreTrainedModel,
    *,
    chat: bool | None,
    system: str | None,
    max_new_tokens: int | None,
    temperature: float,
    seed: int,
    device: str | torch.device,
    dtype: str,
    trust_remote_code: bool,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress = silent,
) -> tuple[Writer, bool]:
    """A model that is ready to generate, and whether it chats; arguments as of `generate`.

    Raises:
        BesaError: as `generate`, but for the prompt. What needs no weights is checked before they are read.
    """
    check_seed(seed)
    if not 0 <= temperature < math.inf:
        raise BesaError(f"There is no temperature {temperature}: use 0 or a positive number.")
    source = None
    if not isinstance(model, PreTrainedModel):
        source = locate(model, progress, trust_remote_code=trust_remote_code).local(progress)
    tokenizer = tokenizer_of_caller(tokenizer) if source is None else tokenizer or load_tokenizer(source)
    if system is not None:
        check_text(system, "system prompt")
    chat = check_chat(tokenizer, chat, system)
    elsewhere = None
    if isinstance(model, PreTrainedModel):
        check_dtype_of_caller(model, dtype)
        check_memory_of_caller(model, offloaded=True)
        loaded, elsewhere = model, resolve_device(device) if device != "auto" else None
    else:
        assert source is not None
        loaded = load_source(source, resolve_device(device), dtype)
    if not isinstance(loaded, GenerationMixin):
        raise BesaError(f"{type(loaded).__name__} cannot generate text, because its code is no GenerationMixin.")
    most = max_new_tokens or (ANSWER if chat else CONTINUATION)
    return Writer(loaded, tokenizer, most, temperature, seed, elsewhere), chat


def check_text(text: str, name: str) -> None:
    """Refuse text that no tokenizer takes.

    Raises:
        BesaError: it holds half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BesaError(f"The {name} holds half a surrogate pair, which is no character: remove it.") from None


@dataclass(frozen=True)
class Written:
    """What a model wrote.

    Attributes:
        text: without the prompt and without special tokens.
        tokens_1T: ids (1, T) of the prompt and of what follows.
        cache: keys and values of all these tokens but the last, to go on from; None if they cannot be reused.
    """

    text: str
    tokens_1T: Tensor
    cache: DynamicCache | None


class Writer:
    """A model with its tokenizer and one way of sampling.

    Attributes:
        tokenizer: of the model.
        most: tokens that it writes at most.
        positions: tokens that prompt and answer may have together.

    Args:
        model: that can generate.
        tokenizer: of the model.
        most: see above.
        temperature: 0 always takes the most likely token.
        seed: of the sampling, which starts afresh with each call of `write`.
        device: where the model is while it writes, by default where it is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        most: int,
        temperature: float,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        self.tokenizer, self.most = tokenizer, most
        self.positions = positions(model).most or sys.maxsize
        self._model, self._temperature, self._seed, self._device = model, temperature, seed, device
        self._rows = embedding_rows(model)

    def write(
        self, tokens_1T: Tensor, tell: Callable[[str], None] | None = None, before: Written | None = None
    ) -> Written:
        """Generate from token ids (1, T).

        Args:
            tokens_1T: the prompt.
            tell: called with each word as soon as it is complete.
            before: what was written before. Where the prompt begins with the same tokens, they are not computed again.
                Its cache changes, so it serves once.

        Raises:
            BesaError: the prompt leaves no position, or has a token that the model's embeddings lack; or an output is
                NaN or infinite.
        """
        check_known(tokens_1T, self._rows, self.tokenizer)
        length = tokens_1T.shape[1]
        room = self.positions - length
        if room < 1:
            raise BesaError(f"The prompt has {length:,} tokens, so the model has no position left: shorten it.")
        temperature = self._temperature
        processors = [_Finite(), _Tempered(temperature)] if temperature else [_Finite()]
        with (
            borrowed(self._model, self._device),
            _settings(self._model, (*TOKENS, *LIMITS) if temperature else TOKENS),
            _seeded(self._seed, self._model.device) if temperature else nullcontext(),
        ):
            tokens_1T = tokens_1T.to(self._model.device)
            cache = before and _beginning(before, tokens_1T)
            made = self._model.generate(
                tokens_1T,
                attention_mask=torch.ones_like(tokens_1T),
                max_new_tokens=min(self.most, room),
                streamer=_Telling(self.tokenizer, tell) if tell else None,
                return_dict_in_generate=True,
                do_sample=bool(temperature),
                logits_processor=processors,
                **({"past_key_values": cache} if cache else {}),
            )
        text = str(self.tokenizer.decode(made.sequences[0, length:], skip_special_tokens=True))
        return Written(text, made.sequences, _plain(made.get("past_key_values")))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """While open, torch draws by this seed on the CPU and on a device; other devices' random numbers go on."""
    others = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(others, device_type=device.type):
        torch.default_generator.manual_seed(seed)
        for other in others:
            state = torch.Generator(other).manual_seed(seed).get_state()
            torch.get_device_module(other).set_rng_state(state, other)
        yield


@contextmanager
def _settings(model: GenerationMixin, kept: tuple[str, ...]) -> Iterator[None]:
    """While open, only these settings of a checkpoint change what is generated.

    Raises:
        BesaError: one of them has an invalid value.
    """
    before = model.generation_config
    own = {name: getattr(before, name, None) for name in kept}
    wrong = next((name for name, value in own.items() if value is not None and not _fits(name, value)), None)
    if wrong is not None:
        raise BesaError(f"The model's {GENERATION_CONFIG_NAME} has {wrong} = {own[wrong]!r}: correct it, or remove it.")
    if "top_k" in own:  # where a checkpoint says nothing, transformers would sample of the 50 likeliest tokens
        own["top_k"] = own["top_k"] or 0
    model.generation_config = GenerationConfig(**own)
    try:
        yield
    finally:
        model.generation_config = before


def _fits(name: str, value: Any) -> bool:
    """Whether a setting has a valid value."""
    if name in TOKENS:
        return value != [] and all(isinstance(each, int) for each in (value if isinstance(value, list) else [value]))
    least, most = LIMITS[name]
    return isinstance(value, int if name == "top_k" else int | float) and least <= value <= most


def _plain(cache: Cache | None) -> DynamicCache | None:
    """The cache if it can be shortened to any length; sliding windows and recurrent states cannot."""
    if (
        cache is None
        or type(cache) is not DynamicCache
        or any(type(layer) is not DynamicLayer for layer in cache.layers)
    ):
        return None
    return cache


def _beginning(before: Written, tokens_1T: Tensor) -> DynamicCache | None:
    """The cache of the tokens at the start of a prompt that were written before; None if there are none."""
    if before.cache is None:
        return None
    held = before.cache.get_seq_length()
    most = min(held, tokens_1T.shape[1] - 1)  # the last token of the prompt is always computed
    same = before.tokens_1T[0, :most] == tokens_1T[0, :most]
    common = int(same.cumprod(0).sum())
    if common < held:
        before.cache.crop(common - held)
    return before.cache if common else None


class _Finite(LogitsProcessor):  # type: ignore[misc]
    """Refuses logits that have no softmax. Single tokens may be ruled out by minus infinity."""

    def __call__(self, input_ids: Tensor, scores_NV: Tensor) -> Tensor:
        if not bool(scores_NV.amax(dim=-1).isfinite().all()):
            raise BesaError("The model's output is NaN or infinite: try --dtype float32, or check the checkpoint.")
        return scores_NV


class _Tempered(LogitsProcessor):  # type: ignore[misc]
    """Divides logits by any temperature, without overflow in the differences to the largest."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores_NV: Tensor) -> Tensor:
        wide_NV = scores_NV.to(widest(scores_NV.device))
        return (wide_NV - wide_NV.amax(dim=-1, keepdim=True)) / self._temperature


class _Telling(TextStreamer):  # type: ignore[misc]
    """Joins tokens to words as transformers does, but passes them on instead of printing them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._tell = tell

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on a complete word."""
        if text:
            self._tell(text)
