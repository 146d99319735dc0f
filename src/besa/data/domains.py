"""Embedded texts by domain, to measure on only: no document of theirs is in a text that calibration takes.

Each is natural text by people, up to 1 Mi characters, in an order whose beginning is as mixed as the whole.

| domain | what it is | licence |
| --- | --- | --- |
| `web` | passages of wikiHow articles as HellaSwag has them, with their right endings | MIT (HellaSwag) |
| `encyclopedia` | paragraphs of the English Wikipedia that BoolQ asks about | CC BY-SA 3.0 |
| `code` | source files of public repositories in 13 languages, of long ones the first 8,000 characters | of each file |
| `technical` | papers on language processing, of QASPER; placeholders for formulas and citations | CC BY 4.0 |
| `languages` | articles on the Solar System of nine Wikipedias other than the English | CC BY-SA |
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, zip_longest

from besa.data.assets import fetch
from besa.data.documents import beginning
from besa.data.embedded import articles_to_measure, code_to_measure
from besa.data.questions import questions
from besa.progress import Progress, silent

SIZE = 1 << 20  # characters of a domain, at most
TAG = re.compile(r" *\[(?:header|title|step|substeps)\] *")
PROSE = 60  # characters of the longest heading
PASSAGE = 3000  # bytes of a language before the next one's turn


def held_out(domain: str, progress: Progress = silent) -> list[str]:
    """The documents of a domain.

    Args:
        domain: a key of `DOMAINS`.
        progress: is called during the download, if one is needed.

    Raises:
        BesaError: they cannot be fetched.
    """
    return beginning(iter(DOMAINS[domain](progress)), SIZE)


def _web(progress: Progress) -> Iterable[str]:
    """Each once; the other questions are about captions of films."""
    rows = (row for row in questions("hellaswag", progress) if row["source_id"].startswith("wikihow"))
    passages = (f"{row['ctx']} {row['endings'][int(row['label'])]}" for row in rows)
    return dict.fromkeys(TAG.sub("\n", passage).strip() for passage in passages)


def _encyclopedia(progress: Progress) -> Iterable[str]:
    """Each once, though several questions may be about it; without its title, which is no sentence."""
    return dict.fromkeys(row["passage"].partition(" -- ")[2] for row in questions("boolq", progress))


def _code(progress: Progress) -> Iterable[str]:
    files = code_to_measure(fetch("code", progress).read_text(encoding="utf-8"))
    by_language: dict[str, list[str]] = {language: [] for language, _ in files}
    for language, content in files:
        by_language[language].append(content)
    return _in_turn(by_language.values())


def _technical(progress: Progress) -> Iterator[str]:
    """Title, abstract and paragraphs of each paper, which has a line for every question about it and choice."""
    papers = {}
    with gzip.open(fetch("papers", progress), "rt", encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)["doc"]
            papers[document["title"]] = document
    for paper in papers.values():
        paragraphs = chain.from_iterable(paper["full_text"]["paragraphs"])
        yield "\n\n".join(part for part in (paper["title"], paper["abstract"], *paragraphs) if part.strip())


def _languages(progress: Progress) -> Iterable[str]:
    articles = articles_to_measure(fetch("multilingual", progress).read_text(encoding="utf-8"))
    return _in_turn(list(_passages(lines)) for lines in articles)


def _passages(lines: Iterable[str]) -> Iterator[str]:
    """Paragraphs of prose, without headings and tables, some together."""
    paragraphs = [line.strip() for line in lines if len(line) > PROSE and "\t" not in line]
    while paragraphs:
        taken = 1
        while taken < len(paragraphs) and len("\n\n".join(paragraphs[:taken]).encode()) < PASSAGE:
            taken += 1
        yield "\n\n".join(paragraphs[:taken])
        paragraphs = paragraphs[taken:]


def _in_turn(groups: Iterable[Iterable[str]]) -> Iterator[str]:
    """One of each group, then the next of each."""
    return (text for texts in zip_longest(*groups) for text in texts if text is not None)


DOMAINS: dict[str, Callable[[Progress], Iterable[str]]] = {
    "web": _web,
    "encyclopedia": _encyclopedia,
    "code": _code,
    "technical": _technical,
    "languages": _languages,
}
