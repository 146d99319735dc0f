"""Put measured tables into the README and docs/results.md: `python -m experiments.readme` makes them from result files.

A marker pair `<!-- results:NAME -->` … `<!-- /results -->` holds the content of `experiments/results/NAME.md`. The
tables come from the `besa_run.json` and `besa_eval.json` of their runs, from `beyond/beyond.json`, and from the
verdicts of the experiments. Only the sentences around them are written by hand.
"""

import json
import os
import re
from pathlib import Path

from besa.report.markdown import table
from experiments.paper import findings, listed

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
RUNS = {
    "50": ("demo-full-50", ["dense", "magnitude", "wanda", "sparsegpt", "besa-layerwise", "besa"]),
    "70": ("smollm2-70", ["wanda", "besa"]),
}
INDEX = """# The paper's tables and figures

`python -m experiments.readme` writes this page from the result files in this folder. `python -m experiments` prints the
same.

"""
LINK = re.compile(r"(?<=\]\()(?!https?:)[^)]+(?=\))")
MARKED = re.compile(r"(<!-- results:([\w/]+) -->\n).*?(<!-- /results -->)", re.DOTALL)
TABLE = re.compile(r"^\|.*?\n(?!\|)", re.DOTALL | re.MULTILINE)
DENSE = RESULTS / "demo-full-50" / "dense"


def perplexity(folder: Path) -> float:
    """On the one text that a run was evaluated on."""
    (value,) = json.loads((folder / "besa_eval.json").read_text(encoding="utf-8"))["perplexity"].values()
    return float(value)


def runs(name: str) -> str:
    """Sparsity, perplexity and seconds of some runs, in Markdown."""
    folder, methods = RUNS[name]
    dense = perplexity(DENSE)
    rows = []
    for method in dict.fromkeys(["dense", *methods]):
        place = DENSE if method == "dense" else RESULTS / folder / method
        sparsity, seconds = "0 %", ""
        if method != "dense":
            record = json.loads((place / "besa_run.json").read_text(encoding="utf-8"))
            sparsity, seconds = f"{record['sparsity']:.4%}", f"{record['seconds']:,.0f}"
        value = perplexity(place)
        rows.append([method, sparsity, f"{value:,.2f}", f"{value / dense:.3f}", seconds])
    return table(["method", "sparsity", "WikiText-2 perplexity", "× dense", "seconds"], rows)


def trends() -> str:
    """Each of the paper's experiments with its verdict, in short."""
    rows = []
    for finding in findings(RESULTS):
        name = finding.name if finding.here is None else f"[{finding.name}]({finding.name}/{finding.name}.md)"
        rows.append([f"{name}: {finding.title}", finding.paper.partition(" (")[0].rstrip("."), finding.trend])
    return f"\n{table(['experiment', 'the paper found', 'holds here'], rows, words=3)}\n"


def past() -> str:
    """Methods by sparsity, on the first text, of the experiment that goes past the paper."""
    found = json.loads((RESULTS / "beyond" / "beyond.json").read_text(encoding="utf-8"))
    text = next(iter(found["rows"][0]["mean"]))
    scores = {
        (name, column): row["mean"][text]
        for row in found["rows"]
        for name, _, column in [row["recipe"].partition(" at ")]
    }
    columns = list(dict.fromkeys(column for _, column in scores if column))
    head = f"{text} (dense {scores['dense', '']:,.2f})"
    rows = []
    for name in dict.fromkeys(name for name, column in scores if column):
        own = [scores.get((name, column)) for column in columns]
        rows.append([name, *("" if value is None else f"{value:,.2f}" for value in own)])
    return f"\n{table([head, *columns], rows)}\n"


def with_results(page: Path) -> str:
    """The text of a page with the present content of every marked result."""
    text = page.read_text(encoding="utf-8")
    return MARKED.sub(lambda match: match[1] + _content(match[2], page.parent) + match[3], text)


def _content(name: str, folder: Path) -> str:
    """A result as a page in `folder` shows it; of an experiment's page, only the table."""
    path = RESULTS / f"{name}.md"
    text = path.read_text(encoding="utf-8")
    if text.startswith("# "):
        shown = TABLE.search(text)
        assert shown is not None, f"{name}.md has no table"
        text = f"\n{shown[0]}\n"
    return LINK.sub(lambda link: os.path.relpath(path.parent / link[0], folder), text)


def main() -> None:
    """Bring the tables and the pages that show them up to date."""
    for name in RUNS:
        path = RESULTS / f"{name}.md"
        before, after = TABLE.split(path.read_text(encoding="utf-8"), maxsplit=1)
        path.write_text(before + runs(name) + after, encoding="utf-8")
    (RESULTS / "README.md").write_text(INDEX + listed(findings(RESULTS)), encoding="utf-8")
    (RESULTS / "trends.md").write_text(trends(), encoding="utf-8")
    (RESULTS / "past.md").write_text(past(), encoding="utf-8")
    for page in PAGES:
        page.write_text(with_results(page), encoding="utf-8")


if __name__ == "__main__":
    main()
