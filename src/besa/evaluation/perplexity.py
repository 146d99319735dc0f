"""Perplexity by the protocol of the pruning literature: non-overlapping windows of one long text.

Shape suffixes: W windows, T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from itertools import chain
from typing import Annotated

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from besa.errors import BesaError
from besa.progress import Progress, silent
from besa.system import ranks
from besa.system.ranks import Share

LOGITS = 2048  # tokens whose logits are in memory at a time, unless one window is longer
TOGETHER = 16  # forward passes of an accelerator whose losses are fetched together, because fetching waits for it


# JSON has no infinity. It is written as the string "Infinity"; earlier files have null or a bare Infinity there.
Infinite = Annotated[float, BeforeValidator(lambda value: math.inf if value is None else value)]


class Perplexity(BaseModel):
    """A perplexity with what it was measured on.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        windows: how many windows of the text were used.
        predicted: tokens predicted, window − 1 in each window.
        bos: whether each window began with the token that begins a text.
        sha256: of the token ids of these windows, as int64; None in files of before.
        bits_per_byte: mean bits for a token, by the mean bytes of the text's tokens, which makes it comparable
            between tokenizers; None where the text's bytes are not known.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    perplexity: Infinite
    windows: int
    predicted: int
    bos: bool = False
    sha256: str | None = None
    bits_per_byte: float | None = None


def perplexity(
    model: PreTrainedModel,
    tokens_L: Tensor,
    window: int,
    max_windows: int | None = None,
    batch: int | None = None,
    size_of: Callable[[int], float] | None = None,
    bos: int | None = None,
    progress: Progress = silent,
) -> Perplexity:
    """exp of the mean cross-entropy over all predicted tokens of the text's windows; the tail is dropped.

    Ranks share the windows in whole forward passes, whose losses all of them add up in one order. The number is
    therefore the same for any number of ranks.

    A window of T tokens is T tokens of the text, of which the first is not predicted. With a BOS token it is that and
    T − 1 tokens of the text, all of which are predicted.

    Args:
        model: causal decoder; it runs where it is.
        tokens_L: the whole text as token ids (L,), int64.
        window: T, the tokens of a window.
        max_windows: use only so many windows from the text's beginning.
        batch: windows in a forward pass; by default as many as 2048 tokens hold. The number does not depend on it
            beyond rounding.
        size_of: gives the bytes in UTF-8 of the text's first so many tokens; None if nobody knows.
        bos: token that begins every window, None for none.
        progress: called with (windows done, number of windows, perplexity so far), as if all ranks were as far as
            this one.

    Raises:
        BesaError: the text is shorter than one window, or the model's output is not finite.
    """
    check_window(window)
    if max_windows is not None and max_windows < 1:
        raise BesaError(f"Perplexity over {max_windows} windows is impossible: use at least 1.")
    check_long_enough("The text", len(tokens_L), window, bos)
    text_tokens = _of_text(window, bos)
    windows = len(tokens_L) // text_tokens
    if max_windows is not None:
        windows = min(windows, max_windows)
    tokens_WT = tokens_L[: windows * text_tokens].reshape(windows, text_tokens)
    if bos is not None:
        tokens_WT = torch.cat([torch.full((windows, 1), bos), tokens_WT], dim=1)
    batch = min(batch or max(1, LOGITS // window), windows)
    own_WT = tokens_WT[Share.of(windows, batch).places]
    total = 0.0
    for loss in chain.from_iterable(ranks.all_of(_losses(model, own_WT, batch, windows, progress))):
        total += loss
    if not math.isfinite(total):
        raise BesaError("The model's output is NaN or infinite: try --dtype float32, or check the checkpoint.")
    predicted = windows * (window - 1)
    bits = total / predicted / math.log(2)
    return Perplexity(
        perplexity=_exp(total, predicted),
        windows=windows,
        predicted=predicted,
        bos=bos is not None,
        sha256=hashlib.sha256(tokens_WT.cpu().numpy().tobytes()).hexdigest(),
        bits_per_byte=None if size_of is None else bits * text_tokens * windows / size_of(text_tokens * windows),
    )


def check_long_enough(text: str, tokens: int, window: int, bos: int | None) -> None:
    """Refuse a text that is shorter than a window.

    Args:
        text: what to call it.
        tokens: of the text.
        window: tokens of a window.
        bos: token that begins every window, None for none.

    Raises:
        BesaError: it is.
    """
    if tokens < _of_text(window, bos):
        raise BesaError(
            f"{text} has {tokens:,} tokens, fewer than one window of {_of_text(window, bos):,}: use a smaller --window."
        )


def _of_text(window: int, bos: int | None) -> int:
    """Tokens of the text in a window."""
    return window if bos is None else window - 1


def check_window(window: int) -> None:
    """Refuse a window in which nothing is predicted.

    Raises:
        BesaError: it has fewer than two tokens.
    """
    if window < 2:
        raise BesaError(f"A window of {window} tokens predicts nothing: use at least 2.")


def _losses(model: PreTrainedModel, own_WT: Tensor, batch: int, windows: int, progress: Progress) -> list[float]:
    """The loss of each forward pass of this rank; if one is not finite, those up to it.

    Args:
        model: as in `perplexity`.
        own_WT: windows of this rank.
        batch: windows in a forward pass.
        windows: of all ranks.
        progress: as in `perplexity`.
    """
    losses: list[float] = []
    waiting: list[Tensor] = []
    total, done = 0.0, 0
    together = 1 if model.device.type == "cpu" else TOGETHER
    for part_WT in own_WT.split(batch) if len(own_WT) else ():
        waiting.append(_negative_log_likelihood(model, part_WT.to(model.device)))
        done += len(part_WT)
        if len(waiting) < together and done < len(own_WT):
            continue
        fetched: list[float] = torch.stack(waiting).tolist()
        waiting.clear()
        losses += fetched
        for loss in fetched:
            total += loss
        if not math.isfinite(total):
            break
        so_far = f"perplexity {_exp(total, done * (own_WT.shape[1] - 1)):.2f}"
        progress(done * windows / len(own_WT), windows, so_far)
    return losses


@torch.no_grad()
def _negative_log_likelihood(model: PreTrainedModel, tokens_WT: Tensor) -> Tensor:
    """Summed over all predicted tokens of the windows."""
    logits_WTV = model(input_ids=tokens_WT, use_cache=False).logits[:, :-1].float()
    return cross_entropy(logits_WTV.flatten(0, 1), tokens_WT[:, 1:].flatten(), reduction="sum")


def _exp(total: float, predicted: int) -> float:
    mean = total / predicted
    return math.exp(mean) if mean < 700 else math.inf
