"""Numbers as the report prints them; also the template's filters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from besa.storage.amounts import in_words

NO_VALUE, INFINITE = "—", "∞"
MINUS, TIMES, SPACE = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{NO-BREAK SPACE}"


def perplexity(value: float) -> str:
    """Two decimals as in papers, fewer where they mean nothing."""
    if not math.isfinite(value):
        return INFINITE
    if value < 1000:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def percent(share: float, digits: int = 2) -> str:
    """A share in per cent."""
    return f"{100 * share:.{digits}f}{SPACE}%"


def tidy_percent(share: float) -> str:
    """A share in per cent with as many digits as it has, but at least two and at most six."""
    digits = f"{100 * share:.6f}".rstrip("0")
    return percent(share, max(2, len(digits.partition(".")[2])))


def percent_unlike(share: float, other: float) -> str:
    """A share in per cent with at least four digits, and as many as tell it from another."""
    digits = next((d for d in range(4, 12) if percent(share, d) != percent(other, d)), 12)
    return percent(share, digits)


def points(difference: float, error: float | None = None) -> str:
    """A difference of shares in points with its sign, and its standard error."""
    said = f"{100 * difference:+.2f}".replace("-", MINUS)
    return said if error is None else f"{said} ± {100 * error:.2f}"


def count(number: float) -> str:
    """A whole number with thousands set apart."""
    return f"{number:,.0f}"


def counted(number: int, thing: str) -> str:
    """`1 block`, `2 blocks`."""
    return f"{count(number)} {thing}" + ("" if number == 1 else "s")


def seconds(duration: float) -> str:
    """Seconds, to three digits or to the second."""
    digits = 0 if duration >= 100 else 1 if duration >= 10 else 2
    return f"{duration:,.{digits}f}{SPACE}s"


def size(number: float) -> str:
    """Bytes in a unit in which they are no zero."""
    return in_words(number).replace(" ", SPACE)


def significant(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits."""
    return f"{value:.{digits}g}" if value is not None and math.isfinite(value) else NO_VALUE


def times(ratio: float) -> str:
    """A ratio, ready for what it multiplies."""
    return f"{ratio:.2f}{SPACE}{TIMES}{SPACE}"


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)
