"""Documents to one stream of token ids.

Shape suffixes: L tokens of a whole text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from besa.data.documents import beginning
from besa.errors import BesaError
from besa.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 1 << 20  # at a time: the tokenizer's bookkeeping dwarfs the tokens


def tokenize(
    documents: Iterable[str],
    separator: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    enough: int | None = None,
    total: int | None = None,
    progress: Progress = silent,
) -> torch.Tensor:
    """Turn documents, with the separator in between, into one stream of token ids (L,), int64.

    No special tokens are added, so a single document gives exactly `tokenizer(document, add_special_tokens=False)`.

    Args:
        documents: one after another; no more are taken than needed.
        separator: stands between two of them.
        tokenizer: of the model.
        enough: tokens after which no more documents are taken, None to take all.
        total: documents, where it is known.
        progress: told how far it is, where `enough` or `total` is given.
    """
    # The separator leads a text and never stands alone: byte-level tokenizers cut "\n\n" and "\n\nWord" differently,
    # and only the second is what the model meets between the paragraphs of a text.
    texts = (separator + document if place else document for place, document in enumerate(documents))
    parts: list[torch.Tensor] = []
    taken = tokens = 0
    while enough is None or tokens < enough:
        batch = beginning(itertools.islice(texts, BATCH_DOCUMENTS), BATCH_CHARACTERS)
        if not batch:
            break
        if parts and (goal := enough or total):
            progress(tokens if enough else taken, goal, "tokenising")
        # verbose=False: that a text is longer than the model's context is meant, and worth no warning.
        found = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        parts.append(torch.tensor([token for ids in found for token in ids], dtype=torch.int64))
        taken, tokens = taken + len(batch), tokens + len(parts[-1])
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def check_known(tokens: torch.Tensor, rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tokens that a model's embeddings have no row for.

    Args:
        tokens: ids of any shape.
        rows: of the embeddings.
        tokenizer: knows what the tokens are called.

    Raises:
        BesaError: an id is too large, or negative.
    """
    smallest, largest = map(int, tokens.aminmax()) if tokens.numel() else (0, 0)
    if smallest < 0:
        raise BesaError(f"The text has a token with the id {smallest:,}: the ids of tokens begin with 0.")
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        named = "a token" if token is None else f"the token {token!r}"  # None: the tokenizer does not know it either
        raise BesaError(
            f"The text has {named} with the id {largest:,}, but the "
            f"model's embeddings have {rows:,} rows only: use the tokenizer that belongs to the model, or resize its "
            "embeddings."
        )
