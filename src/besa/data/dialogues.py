"""Documents as dialogues: the beginning of a passage is what a user says, and the rest is the answer."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest

from besa.data.documents import WHOLE, beginning, read_documents
from besa.data.embedded import EMBEDDED
from besa.progress import Progress, silent

ASKED = 40  # characters that a user says, at least
QUESTION = 400  # characters of a passage whose beginning becomes a question of its own
BREAKS = ("\n\n", "\n", ". ", " ")  # where a document is cut, best first
SENTENCE = re.compile(r"(?<=[.!?؟])\s+|(?<=[。！？])\s*|\s*\n\s*")  # the space between two sentences, or two lines

Turns = tuple[str, str]  # what the user says, and the answer


def dialogues(documents: Iterable[str], size: int) -> Iterator[Turns]:
    """Dialogues of passages of the documents, in their order.

    Args:
        documents: one after another.
        size: characters of a passage, at most; a document may have several.
    """
    for document in documents:
        for passage in _passages(document, size):
            if (turns := _turns(passage)) is not None:
                yield turns


def questions(seed: int, progress: Progress = silent) -> Iterator[str]:
    """Short beginnings of passages of all embedded texts in turn, each text in random order.

    Args:
        seed: of the order.
        progress: is called during a download.

    Raises:
        BesaError: the texts cannot be fetched.
    """
    by_text = []
    for name in EMBEDDED:
        asked = [user for user, _ in dialogues(beginning(read_documents(name, progress), WHOLE), QUESTION)]
        random.Random(f"{seed} {name}").shuffle(asked)
        by_text.append(asked)
    return (question for several in zip_longest(*by_text) for question in several if question is not None)


def _passages(document: str, size: int) -> Iterator[str]:
    """Pieces of a document of at most `size` characters, cut in their second half, at a blank line if possible."""
    start = 0
    while len(document) - start > size:
        first, last = start + size // 2, start + size
        end = next((at + len(gap) for gap in BREAKS if (at := document.rfind(gap, first, last)) >= 0), last)
        yield document[start:end].strip()
        start = end
    yield document[start:].strip()


def _turns(passage: str) -> Turns | None:
    """The first sentences or lines, and the rest; None for a passage that is too short for both.

    Where a passage has no sentences, its first half at most is what the user says.
    """
    half = len(passage) // 2
    if half < ASKED:
        return None
    for gap in SENTENCE.finditer(passage, ASKED):
        if gap.start() > half:
            break
        return passage[: gap.start()], passage[gap.end() :]
    cut = passage.rfind(" ", ASKED, half)
    cut = half if cut < 0 else cut
    return passage[:cut].rstrip(), passage[cut:].lstrip()
