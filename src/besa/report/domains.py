"""The mean over domains, of every run that was measured on all of them."""

from __future__ import annotations

from besa.data.domains import DOMAINS
from besa.evaluation.domains import mean_of_domains
from besa.report import wording
from besa.report.figures import Table
from besa.report.results import Entry, cell


def means(entries: list[Entry]) -> list[Table]:
    """The geometric means of perplexities and of their ratios to dense; nothing where no run has all domains."""
    rows = []
    for entry in entries:
        cells = {domain: found for domain in DOMAINS if (found := cell(entries, entry, domain))}
        mean = mean_of_domains({domain: found.value for domain, found in cells.items()})
        ratio = mean_of_domains({domain: found.ratio for domain, found in cells.items() if found.ratio is not None})
        if mean is not None:
            ratio_shown = wording.NO_VALUE if ratio is None else f"{ratio:.3f}"
            rows.append([entry.label, entry.sparsity, wording.perplexity(mean), ratio_shown])
    caption = f"Geometric mean over {wording.listed(list(DOMAINS))}"
    return [Table(caption, ["method", "sparsity", "perplexity", "÷ dense"], rows)] if rows else []
