"""What to calibrate on: one text, or a mixture of texts by weight, in exact shares of the sequences."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch

from besa.data.embedded import EMBEDDED
from besa.errors import BesaError

MIX = "mix"  # stands for equal shares of all embedded texts
OWN = "self"  # stands for text that the dense model writes
WEIGHED = re.compile(r"(.*):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?inf|nan)", re.DOTALL)
EXAMPLE = "write it as c4:0.5,code:0.5"
DIGITS = 40  # characters of a weight, at most


@dataclass(frozen=True)
class Part:
    """A text of a mixture, and its share of the sequences, as exact as it was written."""

    source: str
    share: Fraction


def parts_of(calibration: str) -> list[Part]:
    """The texts of a calibration, in the order given; `MIX` is one of them. Shares add up to 1.

    A name that is a file, or a data set on the Hub with no comma behind it, is one text. Otherwise, a text ends where a
    weight ends: at a comma or at the end. Commas and colons before its weight belong to its name.

    Args:
        calibration: a text as `read_documents` takes it, `MIX` or `OWN`; or several with positive weights, such as
            ``c4:0.5,code:0.5``.

    Raises:
        BesaError: a weight is missing or not positive, or a text is named twice.
    """
    if calibration in (*EMBEDDED, MIX, OWN) or _is_one(calibration):
        return [Part(calibration, Fraction(1))]
    weighed: list[tuple[str, Fraction]] = []
    name = ""
    for word in calibration.split(","):
        name += word
        if match := WEIGHED.fullmatch(name):
            weighed.append((match[1].strip(), _weight(match[2], calibration)))
            name = ""
        else:
            name += ","
    if name:
        if not weighed and "," not in calibration:
            return [Part(calibration, Fraction(1))]  # no mixture; whoever reads it knows whether there is such a text
        raise BesaError(
            f"--calibration {calibration}: there is no such file, and as a mixture it gives "
            f"{name.rstrip(',').strip() or 'a text'} no weight: {EXAMPLE}."
        )
    _check_names([name for name, _ in weighed], calibration)
    total = sum(weight for _, weight in weighed)
    return [Part(name, weight / total) for name, weight in weighed]


def texts_of(calibration: str) -> list[str]:
    """The texts, as `read_documents` takes them, that sequences are drawn from; none for what the model writes.

    Raises:
        BesaError: as `parts_of`.
    """
    sources = [part.source for part in parts_of(calibration) if part.source != OWN]
    return [text for source in sources for text in (EMBEDDED if source == MIX else [source])]


def _is_one(calibration: str) -> bool:
    """Whether a name is that of a file, or of a data set whose configuration may look like a weight."""
    if calibration.startswith("hf:") and "," not in calibration:
        return True
    try:
        return Path(calibration).is_file()
    except (OSError, ValueError):  # no file can have that name
        return False


def _weight(number: str, calibration: str) -> Fraction:
    """A positive weight.

    Raises:
        BesaError: it is not positive, not finite, or written with too many digits.
    """
    if len(number) > DIGITS:
        raise BesaError(f"--calibration {calibration[:DIGITS]}…: a weight of {len(number)} characters is too long.")
    if not 0 < float(number) < math.inf:
        raise BesaError(f"--calibration {calibration}: a weight of {number} is not positive: {EXAMPLE}.")
    return Fraction(number)


def _check_names(names: Sequence[str], calibration: str) -> None:
    """Check that no text would be drawn from twice: its sequences would overlap.

    Raises:
        BesaError: one is named twice, by itself or within `MIX`, or a name is empty.
    """
    named = [one for name in names for one in (EMBEDDED if name == MIX else [name])]
    if "" in named:
        raise BesaError(f"--calibration {calibration}: a weight stands there without a text: {EXAMPLE}.")
    if twice := next((name for name in named if named.count(name) > 1), None):
        raise BesaError(f"--calibration {calibration}: {twice} is in it twice, so give it one weight.")


def counts(shares: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers that add up to `total` and are nearest to their shares of it, by largest remainder.

    Args:
        shares: add up to 1; of equal remainders, the first goes first.
        total: to be divided.
    """
    exact = [share * total for share in shares]
    whole = [math.floor(number) for number in exact]
    by_remainder = sorted(range(len(exact)), key=lambda place: whole[place] - exact[place])
    for place in by_remainder[: total - sum(whole)]:
        whole[place] += 1
    return whole


def levelled(rooms: Sequence[int], total: int) -> list[int]:
    """Whole numbers that add up to `total`, equal but for those that have less room.

    Args:
        rooms: the most that each can be; together at least `total`.
        total: to be divided; of what is left over, the first get one more.
    """
    given = [0] * len(rooms)
    while left := total - sum(given):
        free = [place for place, room in enumerate(rooms) if given[place] < room]
        each = max(1, left // len(free))
        for place in free[:left]:
            given[place] += min(each, rooms[place] - given[place])
    return given


def interleaved(sizes: Sequence[int], seed: int) -> torch.Tensor:
    """An order (N,) of sequences that stand text by text, in which every 2nd, 4th, 8th … has all texts by their shares.

    Stages hold every so many-th sequence out, or measure on these alone. The first half of an even order therefore goes
    to the even places, the first quarter to every fourth, and so on (bit reversal). Which text comes first is random.

    Args:
        sizes: sequences of each text.
        seed: of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    places = [
        (torch.arange(size, dtype=torch.float64) + torch.rand(size, dtype=torch.float64, generator=generator)) / size
        for size in sizes
        if size
    ]
    even = torch.cat(places).argsort(stable=True)
    order = torch.empty_like(even)
    order[evenly(len(even))] = even
    return order


def evenly(samples: int) -> torch.Tensor:
    """The places (N,) of an order of `interleaved` in which any that follow each other have all texts by their shares.

    Args:
        samples: of all texts.
    """
    bits = samples.bit_length()
    return torch.tensor(sorted(range(samples), key=lambda place: f"{place:0{bits}b}"[::-1]))
