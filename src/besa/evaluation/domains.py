"""One number for all domains: the geometric mean, whose ratio to dense is the mean of the ratios to dense."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import geometric_mean

from besa.data.domains import DOMAINS

ALL = "domains"  # stands for all of them where texts are named, and for their mean among scores


def mean_of_domains(perplexities: Mapping[str, float]) -> float | None:
    """The geometric mean of the perplexities on the domains; None unless every domain is among them.

    Args:
        perplexities: by name of the text; other texts do not count.
    """
    known = [perplexities[domain] for domain in DOMAINS if domain in perplexities]
    return geometric_mean(known) if len(known) == len(DOMAINS) else None
