"""Documents of a text: an embedded one, a local file, or a data set on the Hugging Face Hub."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from besa.data.assets import fetch
from besa.data.embedded import EMBEDDED
from besa.data.textfiles import check_file, file_documents
from besa.errors import BesaError
from besa.progress import Progress, silent

WHOLE = 64 << 20  # characters of the longest text that is held in memory and tokenised whole
HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
HUB_DOCUMENTS = 20_000  # far more than calibration needs, and downloaded in seconds
BEGINNING = 80  # characters of a text that records show


def read_documents(source: str, progress: Progress = silent) -> Iterator[str]:
    """The documents of a text one after another, without blank ones.

    Args:
        source: an embedded text (a key of `EMBEDDED`; `./c4` is a file of that name); a file as `file_documents` takes
            it; or `hf:dataset[:config[:split]]` for the first documents of a Hugging Face dataset (split: train),
            20,000 or as many as hold 64 Mi characters.
        progress: is called during the download and while reading.

    Raises:
        BesaError: there is no such text, it cannot be read, or it is empty.
    """
    check_there(source)
    documents = (document for document in _documents(source, progress) if document.strip())
    first = next(documents, None)
    if first is None:
        raise BesaError(f"The text {source} is empty: give one that holds some words.")
    return itertools.chain([first], documents)


def _documents(source: str, progress: Progress) -> Iterable[str]:
    if source in EMBEDDED:
        return EMBEDDED[source](fetch(source, progress).read_text(encoding="utf-8-sig"))
    if source.startswith("hf:"):
        return _hub_documents(source, progress)
    return file_documents(Path(source), progress)


def check_there(source: str) -> None:
    """Check that a text is there, as far as files of this machine tell; nothing is downloaded.

    Args:
        source: as `read_documents` takes it.

    Raises:
        BesaError: it has no name, or is no file that can be read.
    """
    if not source.strip():
        raise BesaError("The name of a text is empty: give an embedded text (such as c4), a file, or hf:<dataset>.")
    if source not in EMBEDDED and not source.startswith("hf:"):
        check_file(Path(source))


def first_document(source: str) -> int:
    """Characters of the first document of a local file; 0 for what may have to be downloaded.

    Raises:
        BesaError: the file cannot be read.
    """
    if source in EMBEDDED or not Path(source).is_file():
        return 0
    return len(next(file_documents(Path(source)), ""))


def beginning(documents: Iterator[str], characters: int) -> list[str]:
    """The first documents that hold so many characters, or all; the iterator continues after them."""
    taken = []
    for document in documents:
        taken.append(document)
        characters -= len(document)
        if characters <= 0:
            break
    return taken


def shown(document: str) -> str:
    """The beginning of a document, so that a reader can see that the text was read as intended."""
    return document[:BEGINNING]


def _hub_documents(source: str, progress: Progress) -> list[str]:
    dataset, config, split, *rest = [*source.removeprefix("hf:").split(":"), "", ""]
    if any(rest) or not HUB_NAME.fullmatch(dataset):  # else it may lead to a folder
        raise BesaError(f"Cannot read {source}: write hf:<dataset>, hf:<dataset>:<config> or add :<split> to that.")
    where = {"path": dataset, "name": config or None, "split": split or "train"}
    return beginning(hub_column(source, where, "text", HUB_DOCUMENTS, progress), WHOLE)


def check_remote(name: str, dataset: str) -> None:
    """Check that no local path has the name of a Hub data set: the datasets library would read or run that instead.

    Args:
        name: of the data set in messages.
        dataset: its name on the Hub.

    Raises:
        BesaError: there is a folder or file with the data set's name.
    """
    if os.path.lexists(dataset):
        raise BesaError(
            f"{name} is a data set on the Hub, but {dataset} exists here too and would be read in its place: "
            "run besa in another folder, or give local files by their own names."
        )


def hub_column(
    name: str, where: Mapping[str, Any], column: str, rows: int | None, progress: Progress = silent
) -> Iterator[str]:
    """The strings of a column of a data set on the Hugging Face Hub, one after another.

    Args:
        name: of the data set in messages.
        where: arguments of `datasets.load_dataset`.
        column: of the data set.
        rows: number of rows to read from the beginning; None for all.
        progress: is called with the number of rows read, if `rows` is given.

    Raises:
        BesaError: it cannot be read, or there is a local folder or file with its name.
    """
    check_remote(name, where["path"])
    try:
        import datasets
    except ImportError as exc:
        raise BesaError(
            f'Reading {name} needs the datasets library: pip install "besa-llm[data]", or give a local file.'
        ) from exc
    try:
        for done, row in enumerate(itertools.islice(datasets.load_dataset(**where, streaming=True), rows), start=1):
            if not isinstance(row.get(column), str):
                raise ValueError(f'a row has no string "{column}"')
            if rows:
                progress(done, rows, f"reading {name}")
            yield row[column]
    except Exception as exc:  # the library passes on all exceptions of its HTTP, file and parser layers
        reason = str(exc).partition("\n")[0].rstrip(".") or type(exc).__name__
        raise BesaError(
            f"Could not read {name} from the Hugging Face Hub ({reason}): check the name, the config, the split and "
            "the connection, or give a local file."
        ) from exc
