"""Texts for perplexity: the three test sets of the pruning papers with their own protocols, domains, and other texts.

Here, `wikitext2`, `ptb` and `c4` always mean the test sets, and `web`, `encyclopedia`, `code`, `technical` and
`languages` the embedded domains, which nothing is calibrated on. Any other name is a text as calibration takes it.
Documents are joined by blank lines. The name `c4` therefore never means the embedded C4 documents, which are for
calibration.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from besa.data.documents import WHOLE, beginning, check_there, hub_column, read_documents, shown
from besa.data.domains import DOMAINS, held_out
from besa.data.embedded import EMBEDDED
from besa.data.questions import ACCURACY, TASKS
from besa.data.textfiles import COMPRESSED, check_file, file_documents, is_plain_text
from besa.data.tokens import check_known, tokenize
from besa.errors import BesaError
from besa.evaluation.domains import ALL
from besa.evaluation.perplexity import Perplexity, check_long_enough, perplexity
from besa.models.limits import embedding_rows
from besa.progress import Progress, silent

HUB = "hub"  # the source of a test set that came from the Hugging Face Hub


@dataclass(frozen=True)
class NamedSet:
    """A test set of the pruning papers.

    Attributes:
        hub: arguments of `datasets.load_dataset` for the Hugging Face Hub.
        column: of the data set.
        separator: text between two rows.
        lines: splits a plain text file into rows; None if a file must have separate documents.
        rows: number of rows to use, from the beginning; None for all.
        tokens: number of tokens to use, from the beginning; None for all.
    """

    hub: Mapping[str, object]
    column: str
    separator: str
    lines: Callable[[str], Iterable[str]] | None
    rows: int | None = None
    tokens: int | None = None


def _raw_lines(text: str) -> Iterator[str]:
    """WikiText's rows, as in its parquet files: each line with its line break; an empty string for a blank line."""
    return (line if line.strip() else "" for line in io.StringIO(text))


def _sentences(text: str) -> Iterator[str]:
    """The Penn Treebank's rows: each line without the spaces around it."""
    return (line.strip() for line in io.StringIO(text) if line.strip())


TEST_SETS = {
    "wikitext2": NamedSet(
        {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}, "text", "\n\n", _raw_lines
    ),
    "ptb": NamedSet(
        {
            "path": "ptb-text-only/ptb_text_only",
            "name": "penn_treebank",
            "revision": "refs/convert/parquet",  # the data set itself is a script, which libraries no longer run
            "split": "test",
        },
        "sentence",
        " ",
        _sentences,
    ),
    "c4": NamedSet(
        {
            "path": "allenai/c4",
            "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
            "split": "validation",
        },
        "text",
        " ",
        None,
        rows=1100,
        tokens=256 * 2048,
    ),
}


@dataclass(frozen=True)
class Text:
    """A text to measure perplexity on.

    Attributes:
        name: key of the result.
        parts: of the text, in order; of a text longer than 64 Mi characters, the first parts.
        separator: text between two parts.
        source: where the text comes from, for the record.
        tokens: number of tokens to use, from the beginning; None for all.
        further: the parts after these; they are read once, when they are needed.
    """

    name: str
    parts: list[str]
    separator: str
    source: str
    tokens: int | None = None
    further: Iterator[str] = field(default_factory=lambda: iter(()))

    @property
    def beginning(self) -> str:
        """First characters of the first part that is not blank."""
        return shown(next(part for part in self.parts if part.strip()))

    def tokenized(
        self, tokenizer: PreTrainedTokenizerBase, enough: int | None = None, progress: Progress = silent
    ) -> tuple[torch.Tensor, int]:
        """Token ids (L,) of the text, int64, and its bytes in UTF-8.

        Args:
            tokenizer: of the model.
            enough: if the text has further parts, stop after about so many tokens, and count the bytes of these; None
                for all. Texts without further parts are tokenised whole.
            progress: is called during the work.
        """
        parts, more = self.parts, list(islice(self.further, 1))
        if self.name in TEST_SETS:  # as the papers do: one string
            parts = [self.separator.join(self.parts)]
        sizes: list[int] = []

        def counted() -> Iterator[str]:
            for part in chain(parts, more, self.further):
                sizes.append(len(part.encode()))
                yield part

        if more:
            tokens_L = tokenize(counted(), self.separator, tokenizer, enough=enough, progress=progress)
        else:
            tokens_L = tokenize(counted(), self.separator, tokenizer, total=len(parts), progress=progress)
        return tokens_L, sum(sizes) + len(self.separator) * (len(sizes) - 1)


def read_texts(texts: Iterable[str], data: Mapping[str, str | Path], progress: Progress = silent) -> list[Text]:
    """Read the texts to measure perplexity on.

    Args:
        texts: names of `TEST_SETS` or `DOMAINS`, ``domains`` for all of these, the embedded ``wiki``, files, or
            ``hf:<dataset>``.
        data: local files of test sets by name; other test sets come from the Hugging Face Hub.
        progress: is called during a download.

    Raises:
        BesaError: a text cannot be read, or as `check_texts`.
    """
    texts = spelled_out(texts)
    check_texts(texts, data)
    return [
        _test_set(text, data.get(text), progress) if text in TEST_SETS else _other(text, text_name(text), progress)
        for text in texts
    ]


def check_texts(texts: Iterable[str], data: Mapping[str, str | Path]) -> None:
    """Check what can be known of texts before anything is read or downloaded; arguments as of `read_texts`.

    Raises:
        BesaError: a file is not there, two texts have the same name, a file has the name of a test set or a domain, or
            `data` names a set that is not in `texts`.
    """
    texts = spelled_out(texts)
    for name in data:
        if name not in TEST_SETS:
            raise BesaError(f"--data {name}=…: there is no test set {name}, only {', '.join(TEST_SETS)}.")
        if name not in texts:
            raise BesaError(f"--data {name}=… is not used: add --ppl {name}, or leave it out.")
    names = [text_name(text) for text in texts]
    for text, name in zip(texts, names, strict=True):
        if names.count(name) > 1:
            raise BesaError(f"Two texts have the name {name}: measure on them one at a time.")
        if name in TEST_SETS and text != name:
            raise BesaError(
                f"{text} has the name of a test set: if it is that set, give it as --ppl {name} --data {name}={text}, "
                "else rename it."
            )
        if name in {ALL, *DOMAINS} and text != name:
            raise BesaError(f"{text} has the name of an embedded text (--ppl {name}): rename it.")
        if name in {ACCURACY, *TASKS}:
            raise BesaError(f"{text} has the name of an accuracy ({name}): rename it.")
    for text in texts:
        if text in data:
            check_file(Path(data[text]))
        elif text not in TEST_SETS and text not in DOMAINS:
            check_there(text)


def spelled_out(texts: Iterable[str]) -> list[str]:
    """The texts, with the domains themselves in the place of ``domains``."""
    return [one for text in texts for one in (DOMAINS if text == ALL else [text])]


def perplexities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    windows: Sequence[int],
    max_windows: int | None = None,
    batch: int | None = None,
    bos: int | None = None,
    progress: Progress = silent,
) -> dict[int, dict[str, Perplexity]]:
    """Measure perplexity on every text in windows of every length. All texts are tokenised and checked first.

    Args:
        model: causal decoder; it runs on its own device.
        tokenizer: of the model.
        texts: from `read_texts`; each can be used once.
        windows: tokens of a window, one or several lengths.
        max_windows: as in `perplexity`.
        batch: as in `perplexity`.
        bos: as in `perplexity`.
        progress: is called with (windows done, windows, perplexity so far) for each text.

    Returns:
        Perplexities by length of the window and by name of the text.

    Raises:
        BesaError: the model does not know a token of a text, a text is shorter than a window, or as `perplexity`.
    """
    enough = None if max_windows is None else max_windows * max(windows)
    tokenized = [text.tokenized(tokenizer, enough, progress) for text in texts]
    for text, (tokens_L, _) in zip(texts, tokenized, strict=True):
        check_known(tokens_L, embedding_rows(model), tokenizer)
        for length in windows:
            check_long_enough(f"The text {text.name}", len(tokens_L[: text.tokens]), length, bos)
    measured: dict[int, dict[str, Perplexity]] = {length: {} for length in windows}
    for text, (tokens_L, size) in zip(texts, tokenized, strict=True):
        size_of = partial(_size, tokenizer, tokens_L, size)
        for length, by_name in measured.items():
            used_L = tokens_L[: text.tokens]
            by_name[text.name] = perplexity(model, used_L, length, max_windows, batch, size_of, bos, progress)
    return measured


def _size(tokenizer: PreTrainedTokenizerBase, tokens_L: torch.Tensor, size: int, first: int) -> float:
    """Bytes of the first tokens of a text that has `size` bytes, which are spread as in what the tokenizer decodes."""
    if first == len(tokens_L):
        return size
    of_first, of_all = (len(tokenizer.decode(part_L).encode()) for part_L in (tokens_L[:first], tokens_L))
    return size * (of_first / of_all if of_first else first / len(tokens_L))


def text_name(text: str) -> str:
    """The key of a text's results: the name of an embedded text, Hub data set or test set, or the file's stem."""
    if text in EMBEDDED or text in TEST_SETS or text in DOMAINS or text.startswith("hf:"):
        return text
    path = Path(text)
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).stem


def _other(text: str, name: str, progress: Progress) -> Text:
    if text in DOMAINS:
        return Text(name, held_out(text, progress), "\n\n", "embedded")
    documents = read_documents(text, progress)
    return Text(name, beginning(documents, WHOLE), "\n\n", text, further=documents)


def _test_set(name: str, file: str | Path | None, progress: Progress) -> Text:
    test_set = TEST_SETS[name]
    if file is None:
        try:
            rows = list(hub_column(name, test_set.hub, test_set.column, test_set.rows, progress))
        except BesaError as error:
            raise BesaError(f"{str(error).rstrip('.')} (--data {name}=FILE).") from None
        return Text(name, rows, test_set.separator, HUB, test_set.tokens)
    path = Path(file)
    if not is_plain_text(path):
        rows = list(islice(file_documents(path, progress), test_set.rows))
    elif test_set.lines is None:
        raise BesaError(f"--data {name}={file}: it must keep documents apart, so give a file of JSON lines or parquet.")
    else:
        rows = list(test_set.lines("\n\n".join(file_documents(path, progress))))
    if not any(row.strip() for row in rows):
        raise BesaError(f"The text {file} is empty: give one that holds some words.")
    return Text(name, rows, test_set.separator, path.name, test_set.tokens)
