"""Documents of a text: an embedded one, a local file, or a data set on the Hugging Face Hub."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from besa.data.assets import fetch
from besa.data.textfiles import file_documents
from besa.errors import BesaError
from besa.progress import Progress, silent

WHOLE = 64 << 20  # characters of a text that is held in memory and tokenised whole
HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
HUB_DOCUMENTS = 20_000  # far more than a calibration set needs, and still a download of seconds
BEGINNING = 80  # characters of a text that records show


def read_documents(source: str, progress: Progress = silent) -> Iterator[str]:
    """The documents of a text one after another, none of them blank.

    Args:
        source: an embedded text (`c4`, `wiki`; it wins over a file of that name, which `./c4` still reaches); a file
            as `file_documents` takes it; or `hf:dataset[:config[:split]]` for the first documents of a Hugging Face
            dataset (split: train), 20,000 or as many as hold 64 Mi characters.
        progress: told how far the download or the reading is.

    Raises:
        BesaError: there is no such text, it cannot be read, or it is empty.
    """
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


def _c4_documents(text: str) -> Iterable[str]:
    """One document a line; the first nine are the navigation of web pages, not prose."""
    return text.split("\n")[9:]


def _wiki_documents(text: str) -> Iterable[str]:
    """Articles between `<doc …>` and `</doc>`."""
    return (article.strip() for article in re.findall(r"<doc [^>]*>(.*?)</doc>", text, re.DOTALL))


EMBEDDED: dict[str, Callable[[str], Iterable[str]]] = {"c4": _c4_documents, "wiki": _wiki_documents}


def beginning(documents: Iterator[str], characters: int) -> list[str]:
    """Take documents until they hold so many characters or there are no more; the iterator goes on behind them."""
    taken = []
    for document in documents:
        taken.append(document)
        characters -= len(document)
        if characters <= 0:
            break
    return taken


def shown(document: str) -> str:
    """The beginning of a document for a reader who wants to see that the text was read as it is meant."""
    return document[:BEGINNING]


def _hub_documents(source: str, progress: Progress) -> list[str]:
    dataset, config, split, *rest = [*source.removeprefix("hf:").split(":"), "", ""]
    if any(rest) or not HUB_NAME.fullmatch(dataset):  # else it may lead to a folder
        raise BesaError(f"Cannot read {source}: write hf:<dataset>, hf:<dataset>:<config> or add :<split> to that.")
    where = {"path": dataset, "name": config or None, "split": split or "train"}
    return beginning(hub_column(source, where, "text", HUB_DOCUMENTS, progress), WHOLE)


def check_remote(name: str, dataset: str) -> None:
    """Refuse a data set of the Hub in whose place the datasets library would read, or run, what is here.

    Args:
        name: what to call it.
        dataset: its name on the Hub.

    Raises:
        BesaError: there is a folder or file of the data set's name.
    """
    if os.path.lexists(dataset):
        raise BesaError(
            f"{name} is a data set on the Hub, but there is a {dataset} here too, which would be read in its place: "
            "run besa in another folder, or give local files by their own names."
        )


def hub_column(
    name: str, where: Mapping[str, Any], column: str, rows: int | None, progress: Progress = silent
) -> Iterator[str]:
    """A column of strings of a data set on the Hugging Face Hub, one after another.

    Args:
        name: what to call it.
        where: it is, as `datasets.load_dataset` takes it.
        column: of the data set.
        rows: only so many from its beginning, None for all.
        progress: told how many rows have come, where it is known how many shall.

    Raises:
        BesaError: it cannot be read, or the library would take a folder or file here for it.
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
    except Exception as exc:  # the library lets through whatever its HTTP, file and parser layers raise
        reason = str(exc).partition("\n")[0].rstrip(".") or type(exc).__name__
        raise BesaError(
            f"Could not read {name} from the Hugging Face Hub ({reason}): check the name, the config, the split and "
            "the connection, or give a local file."
        ) from exc
