"""Text to token batches: where the calibration samples of every method come from.

Shape suffixes: N samples, T tokens of a sample, L tokens of a whole text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from besa.assets import fetch
from besa.errors import BesaError
from besa.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB_DOCUMENTS = 20_000  # far more than a calibration set needs, and still a download of seconds
TOKENIZER_BATCH = 256  # documents; bounds the memory of the tokenizer's bookkeeping, which dwarfs the tokens


@dataclass(frozen=True, eq=False)
class Calibration:
    """N samples of T token ids each, int64 on the CPU, and what they were drawn from."""

    tokens_NT: torch.Tensor
    source: str
    seed: int

    @property
    def samples(self) -> int:
        """N, the number of sequences."""
        return self.tokens_NT.shape[0]

    @property
    def seqlen(self) -> int:
        """T, the tokens of each sequence."""
        return self.tokens_NT.shape[1]

    @property
    def sha256(self) -> str:
        """The identity of the data in run records: hex digest of the token ids as little-endian int64."""
        return hashlib.sha256(self.tokens_NT.numpy().astype("<i8").tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Identity of the data for a run record."""
        about = {"source": self.source, "samples": self.samples, "seqlen": self.seqlen, "seed": self.seed}
        return about | {"sha256": self.sha256}


def sample(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seqlen: int,
    seed: int,
    progress: Progress = silent,
) -> Calibration:
    """Draw non-overlapping windows of tokens at random from a text; the same arguments give the same windows.

    Args:
        source: As `read_documents` takes it.
        tokenizer: The tokenizer of the model to calibrate.
        samples: N, how many windows.
        seqlen: T, tokens per window.
        seed: Decides which windows, and their order.
        progress: Told how far the download is, for a text that needs one.

    Raises:
        BesaError: A count is too small, the text is too short for N·T tokens, or `read_documents` refuses the source.
    """
    if samples < 1:
        raise BesaError(f"Calibration with {samples} samples is impossible: ask for at least 1.")
    if seqlen < 2:
        raise BesaError(f"Calibration sequences of {seqlen} tokens are too short: ask for a --seqlen of at least 2.")
    tokens_L = tokenize(read_documents(source, progress), "\n\n", tokenizer)
    spare = len(tokens_L) - samples * seqlen
    if spare < 0:
        raise BesaError(
            f"The text {source} holds {len(tokens_L):,} tokens, but {samples:,} sequences of {seqlen:,} tokens need "
            f"{samples * seqlen:,}: use a longer text, fewer --samples or a shorter --seqlen."
        )
    generator = torch.Generator().manual_seed(seed)
    # A random phase lets windows begin anywhere in the text, not only at multiples of T.
    phase = int(torch.randint(min(spare, seqlen - 1) + 1, (), generator=generator))
    windows_WT = tokens_L[phase:].unfold(0, seqlen, seqlen)
    chosen_N = torch.randperm(len(windows_WT), generator=generator)[:samples]
    return Calibration(windows_WT[chosen_N], source, seed)


def tokenize(documents: list[str], separator: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Turn documents, with the separator in between, into one stream of token ids (L,), int64.

    No special tokens are added, so a single document gives exactly `tokenizer(document, add_special_tokens=False)`.
    """
    # The separator leads a text and never stands alone: byte-level tokenizers cut "\n\n" and "\n\nWord" differently,
    # and only the second is what the model meets between the paragraphs of a text.
    texts = [*documents[:1], *(separator + document for document in documents[1:])]
    stream: list[int] = []
    for start in range(0, len(texts), TOKENIZER_BATCH):
        # verbose=False: that a text is longer than the model's context is meant, and worth no warning.
        batch = tokenizer(texts[start : start + TOKENIZER_BATCH], add_special_tokens=False, verbose=False)
        stream.extend(itertools.chain.from_iterable(batch["input_ids"]))
    return torch.tensor(stream, dtype=torch.int64)


def read_documents(source: str, progress: Progress = silent) -> list[str]:
    """Return the documents of a text, none of them blank.

    Args:
        source: An embedded text (`c4`, `wiki`; it wins over a file of that name, which `./c4` still reaches);
            a `.jsonl` or `.parquet` file with a field "text"; any other file, read as one UTF-8 document; or
            `hf:dataset[:config[:split]]` for the first 20,000 documents of a Hugging Face dataset (split: train).
        progress: Told how far the download is, for a text that needs one.

    Raises:
        BesaError: There is no such text, it cannot be read, or it is empty.
    """
    if source in EMBEDDED:
        documents = EMBEDDED[source](_read_text(fetch(source, progress)))
    elif source.startswith("hf:"):
        documents = _hub_documents(source, progress)
    else:
        documents = file_documents(Path(source))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise BesaError(f"The text {source} is empty: give one that holds some words.")
    return documents


def _c4_documents(text: str) -> Iterable[str]:
    """One document a line; the first nine are the navigation of web pages, not prose."""
    return text.split("\n")[9:]


def _wiki_documents(text: str) -> Iterable[str]:
    """Articles between `<doc …>` and `</doc>`."""
    return (article.strip() for article in re.findall(r"<doc [^>]*>(.*?)</doc>", text, re.DOTALL))


EMBEDDED: dict[str, Callable[[str], Iterable[str]]] = {"c4": _c4_documents, "wiki": _wiki_documents}


def file_documents(path: Path) -> Iterable[str]:
    """Return the documents of a local file, blank ones too.

    Raises:
        BesaError: There is no such file, or it cannot be read.
    """
    try:
        if not path.is_file():
            raise BesaError(
                f"There is no text {path}: give an embedded one ({', '.join(EMBEDDED)}), a .txt, .jsonl or .parquet "
                "file, or hf:<dataset>."
            )
        if path.suffix == ".parquet":
            return _parquet_documents(path)
        text = _read_text(path)
    except OSError as exc:
        raise BesaError(f"Could not read {path} ({exc.strerror or exc}): give a file that can be read.") from exc
    return _jsonl_documents(path, text) if path.suffix == ".jsonl" else [text]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # -sig: a byte order mark is no part of the text
    except UnicodeDecodeError as exc:
        raise BesaError(f"{path} is not UTF-8 text (byte {exc.start:,}): convert it to UTF-8 first.") from exc


def _jsonl_documents(path: Path, text: str) -> Iterable[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                document: str = json.loads(line)["text"]
                document.encode()  # refuses what is no string, and half a surrogate pair, which no tokenizer takes
            except (ValueError, TypeError, KeyError, AttributeError) as exc:
                raise BesaError(
                    f'Line {number:,} of {path} is not a JSON object with a string "text": correct or remove it.'
                ) from exc
            yield document


def _parquet_documents(path: Path) -> Iterable[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as exc:
        raise BesaError('Reading .parquet files needs pyarrow: pip install "besa-llm[data]".') from exc
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if "text" not in schema.names or schema.field("text").type not in (pa.string(), pa.large_string()):
                raise BesaError(f'{path} has no column "text" of strings, only {", ".join(schema.names)}: rename one.')
            column = file.read(columns=["text"])["text"].to_pylist()
    except (pa.ArrowException, OSError, ValueError) as exc:
        reason = str(exc).partition("\n")[0].rstrip(".")
        raise BesaError(f"{path} is not a readable parquet file ({reason}): write it anew.") from exc
    return (document for document in column if document is not None)


def _hub_documents(source: str, progress: Progress) -> list[str]:
    dataset, config, split, *rest = [*source.removeprefix("hf:").split(":"), "", ""]
    if not dataset or any(rest):
        raise BesaError(f"Cannot read {source}: write hf:<dataset>, hf:<dataset>:<config> or add :<split> to that.")
    where = {"path": dataset, "name": config or None, "split": split or "train"}
    return hub_column(source, where, "text", HUB_DOCUMENTS, progress)


def hub_column(
    name: str, where: Mapping[str, Any], column: str, rows: int | None, progress: Progress = silent
) -> list[str]:
    """Return a column of strings of a data set on the Hugging Face Hub.

    Args:
        name: What to call it.
        where: It is, as `datasets.load_dataset` takes it.
        column: Of the data set.
        rows: Only so many from its beginning, None for all.
        progress: Told how many rows have come, where it is known how many shall.

    Raises:
        BesaError: It cannot be read.
    """
    try:
        import datasets
    except ImportError as exc:
        raise BesaError(
            f'Reading {name} needs the datasets library: pip install "besa-llm[data]", or give a local file.'
        ) from exc
    found: list[str] = []
    try:
        for row in itertools.islice(datasets.load_dataset(**where, streaming=True), rows):
            if not isinstance(row.get(column), str):
                raise ValueError(f'a row has no string "{column}"')
            found.append(row[column])
            if rows:
                progress(len(found), rows, f"reading {name}")
    except Exception as exc:  # the library lets through whatever its HTTP, file and parser layers raise
        reason = str(exc).partition("\n")[0].rstrip(".") or type(exc).__name__
        raise BesaError(
            f"Could not read {name} from the Hugging Face Hub ({reason}): check the name, the config, the split and "
            "the connection, or give a local file."
        ) from exc
    return found
