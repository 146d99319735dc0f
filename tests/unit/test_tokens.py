"""Documents to tokens: the stream is that of the joined text, and of a long one no more is taken than needed."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from besa.data import tokens
from besa.data.tokens import check_known, tokenize
from besa.errors import BesaError


def byte_tokenizer(**options) -> PreTrainedTokenizerFast:
    """GPT-2's splitting of words, over single bytes; a blank line that stands alone is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, "ĊĊ", "<s>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


BYTES = byte_tokenizer()


def ids(text: str) -> list[int]:
    return BYTES(text, add_special_tokens=False)["input_ids"]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_one_document_is_tokenised_as_the_tokenizer_would(document):
    assert tokenize([document], "\n\n", BYTES).tolist() == ids(document)


def test_many_documents_are_tokenised_like_their_joined_text(monkeypatch):
    monkeypatch.setattr(tokens, "BATCH_DOCUMENTS", 2)
    documents = ["One here.", "Two\n\nparagraphs.", "Three", "4", "Fünf"]
    stream = tokenize(documents, "\n\n", BYTES)
    assert stream.dtype == torch.int64
    assert stream.tolist() == ids("\n\n".join(documents))
    assert BYTES.convert_tokens_to_ids("ĊĊ") not in stream
    assert tokenize(documents, "", BYTES).tolist() == [token for document in documents for token in ids(document)]


def test_a_long_stream_is_worth_no_warning():
    heard = []
    handler = logging.Handler()
    handler.emit = heard.append
    logging.getLogger("transformers").addHandler(handler)
    try:
        tokenize(["word " * 20], "\n\n", byte_tokenizer(model_max_length=8))
        assert heard == []
        byte_tokenizer(model_max_length=8)("word " * 20)
        assert len(heard) == 1
    finally:
        logging.getLogger("transformers").removeHandler(handler)


def test_no_more_documents_are_taken_than_needed(monkeypatch):
    monkeypatch.setattr(tokens, "BATCH_DOCUMENTS", 4)
    documents = iter(["abcde"] * 99)
    told = []
    stream = tokenize(documents, "", BYTES, enough=30, progress=lambda *news: told.append(news))
    assert stream.tolist() == ids("abcde") * 8  # in batches of four
    assert len(list(documents)) == 91
    assert told == [(20, 30, "tokenising")]


def test_long_documents_are_tokenised_few_at_a_time(monkeypatch):
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 10)
    documents = ["abcde", "f" * 30, "g", "h"]
    told = []
    assert tokenize(documents, "", BYTES, total=4, progress=lambda *news: told.append(news)).tolist() == [
        token for document in documents for token in ids(document)
    ]
    assert told == [(2, 4, "tokenising")]


def test_ids_that_no_token_has():
    for ids_T, words in [
        ([3, -1], "the id -1: the ids of tokens begin with 0"),
        ([10**6], "a token with the id 1,000,000"),
    ]:
        with pytest.raises(BesaError, match=words):
            check_known(torch.tensor(ids_T), 257, BYTES)


def test_a_token_that_the_model_does_not_know_is_named():
    known = torch.tensor([[1, 2], [3, 256]])
    check_known(known, 257, BYTES)
    check_known(torch.zeros(0, dtype=torch.int64), 1, BYTES)
    with pytest.raises(BesaError) as caught:
        check_known(known, 256, BYTES)
    assert str(caught.value) == (
        "The text has the token 'ĊĊ' with the id 256, but the model's embeddings have 256 rows only: use the tokenizer "
        "that belongs to the model, or resize its embeddings."
    )
