"""The embedded texts: documents that calibration may take, and the parts that are held out to measure on.

`code` and `multilingual` are divided: of each, `domains` measures on one part, and calibration takes the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

HELD_OUT = 4  # of so many source files, one is measured on; the others are left to calibration
FILE = re.compile(r"^// ===== BEGIN (.*?) =====\n(.*?)\n// ===== END =====$", re.MULTILINE | re.DOTALL)
# Lines of the articles to measure on: Chinese, Italian, German, Russian, French, Afrikaans, Spanish, Dutch, Danish.
ARTICLES = (123, 202), (204, 245), (246, 333), (335, 357), (357, 383), (383, 404), (404, 478), (478, 503), (503, 517)
LICENCES = (0, 19), (113, 183)  # lines of the technical text that stand at the top of source files too


def code_to_measure(text: str) -> list[tuple[str, str]]:
    """Language and content of the source files that are held out."""
    return FILE.findall(text)[::HELD_OUT]


def articles_to_measure(text: str) -> list[list[str]]:
    """The lines of each article that is held out."""
    lines = text.split("\n")
    return [lines[first:end] for first, end in ARTICLES]


def _c4(text: str) -> Iterable[str]:
    """One document per line, without the first nine, which are navigation of web pages, not prose."""
    return text.split("\n")[9:]


def _wiki(text: str) -> Iterable[str]:
    """Articles between `<doc …>` and `</doc>`."""
    return (article.strip() for article in re.findall(r"<doc [^>]*>(.*?)</doc>", text, re.DOTALL))


def _code(text: str) -> Iterable[str]:
    """The other source files, whole."""
    return (content for place, (_, content) in enumerate(FILE.findall(text)) if place % HELD_OUT)


def _technical(text: str) -> Iterable[str]:
    """Between the licences, one document: nothing marks where an article ends."""
    return _outside(LICENCES, text)


def _multilingual(text: str) -> Iterable[str]:
    """What stands between the articles to measure on, without lines that are in these as well."""
    measured = {line for article in articles_to_measure(text) for line in article if line.strip()}
    return _outside(ARTICLES, text, measured)


def _outside(ranges: Iterable[tuple[int, int]], text: str, without: Iterable[str] = ()) -> Iterable[str]:
    """The parts of a text before, between and after ranges of its lines."""
    lines, start, excluded = text.split("\n"), 0, set(without)
    for first, end in (*ranges, (len(lines), 0)):
        yield "\n".join(line for line in lines[start:first] if line not in excluded).strip()
        start = end


EMBEDDED: dict[str, Callable[[str], Iterable[str]]] = {
    "c4": _c4,
    "wiki": _wiki,
    "code": _code,
    "technical": _technical,
    "multilingual": _multilingual,
}
