"""Put measured tables into the README and pages of docs/: `python -m experiments.readme` makes them from result files.

A marker pair `<!-- results:NAME -->` … `<!-- /results -->` holds the content of `experiments/results/NAME.md`, and a
line that says what made it: version, commit, machine and date, and whether the code that makes it has changed since. A
test compares the pages with the files, so that no figure grows older than its code without a word. Only the sentences
around the tables are written by hand.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

from besa.report.markdown import table
from besa.studies.rows import Row
from experiments.choices import choice, forms, recipes
from experiments.paper import Finding, findings, listed, others
from experiments.result import Result

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "recipes.md")
RUNS = {"50": "50 %", "70": "70 %"}  # sparsity of the front page's table, and of the other one
INDEX = """# Results

`python -m experiments.readme` writes this page from the result files in this folder. `python -m experiments` prints the
paper's. "Older than the present code" says that a module has changed that the result depends on; `python -m
experiments.all --confirm COMMIT` compares the present code with that of a commit.

## The paper's tables and figures

"""
OTHERS = """
## Others

"""
LINK = re.compile(r"(?<=\]\()(?!https?:)[^)]+(?=\))")
MARKED = re.compile(r"(<!-- results:([\w./-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)
TABLE = re.compile(r"^\|.*?\n(?!\|)", re.DOTALL | re.MULTILINE)
DOMAINS = ("domains", "domains-gemma3-270m", "domains-qwen2.5-coder-1.5b")
# Results that the tables here are made from; a page of a result itself has its own.
SOURCES = {"50": ("front",), "70": ("front",), "past": ("beyond",), "recipes": DOMAINS, "choice": DOMAINS[:1]}


def runs(name: str) -> str:
    """Sparsity, perplexity and seconds of recipes at one sparsity, in Markdown; the dense model comes first."""
    column, rows = RUNS[name], _result("front").compared()
    ((text, dense),) = rows[0].mean.items()
    cells = []
    for row in rows:
        label, _, own = row.recipe.partition(" at ")
        if own in ("", column):
            spread = row.spread.get(text)
            error = "" if spread is None else f" ± {spread:,.2f}"
            sparsity, seconds = ("0 %", "") if row.seconds is None else (f"{row.sparsity:.4%}", f"{row.seconds:,.0f}")
            cells.append([label, sparsity, f"{row.mean[text]:,.2f}{error}", f"{row.mean[text] / dense:.3f}", seconds])
    return table(["method", "sparsity", "WikiText-2 perplexity", "× dense", "seconds"], cells)


def trends() -> str:
    """Each of the paper's experiments with its verdict, in short."""
    return f"\n{table(['result', 'the paper found', 'holds here', 'made by'], map(_trend, findings()), words=4)}\n"


def _trend(finding: Finding) -> list[str]:
    name = finding.name if finding.result is None else f"[{finding.name}]({finding.name}/{finding.name}.md)"
    paper = finding.paper.partition(" (")[0].rstrip(".")
    return [f"{name}: {finding.title}", paper, finding.trend, finding.note]


def index() -> str:
    """The page of all results, with what made them."""
    return f"{INDEX}{listed(findings())}{OTHERS}{listed(others())}"


def past() -> str:
    """Methods by sparsity, on the first text, of the experiment that goes past the paper."""
    found: list[Row] = _result("beyond").compared()
    text = next(iter(found[0].mean))
    scores = {(name, column): one.mean[text] for one in found for name, _, column in [one.recipe.partition(" at ")]}
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
    """A result as a page in `folder` shows it, and what made it; of a result's page, only the table."""
    path = RESULTS / f"{name}.md"
    text = path.read_text(encoding="utf-8")
    if "/" in name:
        shown = TABLE.search(text)
        assert shown is not None, f"{name}.md has no table"
        text = f"\n{shown[0]}\n"
    return LINK.sub(lambda link: os.path.relpath(path.parent / link[0], folder), text) + _note(name)


def _note(name: str) -> str:
    """What made each result of a table; nothing for a table whose rows say it, or that is of benchmarks."""
    own = (name.partition("/")[0],) if "/" in name else SOURCES.get(name, ())
    notes = {one: _result(one).note for one in own}
    if len(set(notes.values())) > 1:
        return "Made by:\n" + "".join(f"\n- `{one}`: {note}." for one, note in notes.items()) + "\n"
    return f"Made by {notes[own[0]]}.\n" if notes else ""


def _result(name: str) -> Result:
    return Result.read(RESULTS / name / f"{name}.json")


WRITTEN: dict[str, Callable[[], str]] = {
    "README": index, "trends": trends, "past": past, "recipes": recipes, "choice": choice, "forms": forms,
}  # fmt: skip


def main() -> None:
    """Bring the tables and the pages that show them up to date."""
    for name in RUNS:
        path = RESULTS / f"{name}.md"
        before, after = TABLE.split(path.read_text(encoding="utf-8"), maxsplit=1)
        path.write_text(before + runs(name) + after, encoding="utf-8")
    for name, make in WRITTEN.items():
        (RESULTS / f"{name}.md").write_text(make(), encoding="utf-8")
    for page in PAGES:
        page.write_text(with_results(page), encoding="utf-8")


if __name__ == "__main__":
    main()
