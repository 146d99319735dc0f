"""Documents to one stream of token ids.

Shape suffixes: L tokens of a whole text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from besa.data.documents import beginning
from besa.errors import BesaError
from besa.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 1 << 20  # at a time, because the tokenizer's objects far outweigh the tokens


def tokenize(
    documents: Iterable[str],
    separator: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    enough: int | None = None,
    total: int | None = None,
    progress: Progress = silent,
) -> torch.Tensor:
    """One stream of token ids (L,), int64, of documents with a separator in between.

    No special tokens are added, so a single document gives exactly `tokenizer(document, add_special_tokens=False)`.

    Args:
        documents: one after another; only as many as needed are read.
        separator: text between two documents.
        tokenizer: of the model.
        enough: number of tokens after which no more documents are read; None to read all.
        total: number of documents, if known.
        progress: is called if `enough` or `total` is given.
    """
    # The separator is tokenised together with the document after it: byte-level tokenizers split "\n\n" and "\n\nWord"
    # differently, and only the second occurs between the paragraphs of a text.
    texts = (separator + document if place else document for place, document in enumerate(documents))
    parts: list[torch.Tensor] = []
    taken = tokens = 0
    while enough is None or tokens < enough:
        batch = beginning(itertools.islice(texts, BATCH_DOCUMENTS), BATCH_CHARACTERS)
        if not batch:
            break
        if parts and (goal := enough or total):
            progress(tokens if enough else taken, goal, "tokenising")
        # verbose=False: no warning that a text is longer than the model's context, which is intended.
        batch_ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        parts.append(torch.tensor([token for ids in batch_ids for token in ids], dtype=torch.int64))
        taken, tokens = taken + len(batch), tokens + len(parts[-1])
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def packed(pieces: Iterable[Sequence[int]], length: int, bos: int | None = None) -> Iterator[list[int]]:
    """Sequences of `length` token ids that each begin with a piece; the last piece of a sequence is cut.

    Args:
        pieces: token ids of one piece after another.
        length: tokens of a sequence.
        bos: token that begins every sequence, put there where a piece does not begin with it; None for none.
    """
    sequence: list[int] = []
    for piece in pieces:
        if not sequence and bos is not None and list(piece[:1]) != [bos]:
            sequence.append(bos)
        sequence += piece
        if len(sequence) >= length:
            yield sequence[:length]
            sequence = []


def check_known(tokens: torch.Tensor, rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a model's embeddings have a row for every token.

    Args:
        tokens: ids of any shape.
        rows: number of rows of the embeddings.
        tokenizer: gives the tokens' names.

    Raises:
        BesaError: an id is negative or too large.
    """
    smallest, largest = map(int, tokens.aminmax()) if tokens.numel() else (0, 0)
    if smallest < 0:
        raise BesaError(f"The text has a token with the id {smallest:,}: the ids of tokens begin with 0.")
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        named = "a token" if token is None else f"the token {token!r}"  # None: the tokenizer does not know it either
        raise BesaError(
            f"The text has {named} with the id {largest:,}, but the model's embeddings have {rows:,} rows only: use "
            "the tokenizer that belongs to the model, or resize its embeddings."
        )
