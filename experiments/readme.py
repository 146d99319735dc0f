"""Put measured tables into the README and pages of docs/: `python -m experiments.readme` makes them from result files.

A marker pair `<!-- results:NAME -->` … `<!-- /results -->` holds the content of `experiments/results/NAME.md`. The
tables come from the `besa_run.json` and `besa_eval.json` of their runs, from `beyond/beyond.json`, from the verdicts of
the experiments, and from `experiments.choices`. Only the sentences around them are written by hand.
"""

import os
import re
from pathlib import Path

from besa.evaluation.result import EVALUATION_NAME, Evaluation
from besa.record import RunRecord
from besa.report.markdown import table
from besa.studies.origin import Origin
from besa.studies.rows import Row, row
from besa.studies.workspace import Outcome
from experiments.choices import forms, recipes
from experiments.paper import findings, listed
from experiments.result import Result

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "recipes.md")
RUNS = {
    "50": ("demo-full-50", ["dense", "magnitude", "wanda", "sparsegpt", "besa-layerwise", "besa"]),
    "70": ("smollm2-70", ["wanda", "besa"]),
}
INDEX = """# The paper's tables and figures

`python -m experiments.readme` writes this page from the result files in this folder. `python -m experiments` prints the
same.

"""
RUNS_INDEX = """
## Single runs

The front page's table and the one at 70 % are made from these. An evaluation alone does not record its machine.

"""
LINK = re.compile(r"(?<=\]\()(?!https?:)[^)]+(?=\))")
MARKED = re.compile(r"(<!-- results:([\w/]+) -->\n).*?(<!-- /results -->)", re.DOTALL)
TABLE = re.compile(r"^\|.*?\n(?!\|)", re.DOTALL | re.MULTILINE)
DENSE = RESULTS / "demo-full-50" / "dense"


def measured(name: str) -> list[Row]:
    """The runs of a table, the dense model first; each was evaluated on one text."""
    folder, methods = RUNS[name]
    places = {"dense": DENSE} | {method: RESULTS / folder / method for method in methods if method != "dense"}
    return [row(method, [_outcome(place)]) for method, place in places.items()]


def _outcome(folder: Path) -> Outcome:
    """A run and its evaluation; of the dense model's, the machine is not known."""
    record, evaluation = RunRecord.of(folder), Evaluation.read(folder / EVALUATION_NAME)
    machine = record.machine if record else {}
    return Outcome(record, [evaluation], Origin(versions=(record or evaluation).versions, machine=machine))


def runs(name: str) -> str:
    """Sparsity, perplexity and seconds of some runs, in Markdown."""
    rows = measured(name)
    (dense,) = rows[0].mean.values()
    cells = []
    for one in rows:
        (value,) = one.mean.values()
        sparsity, seconds = ("0 %", "") if one.seconds is None else (f"{one.sparsity:.4%}", f"{one.seconds:,.0f}")
        cells.append([one.recipe, sparsity, f"{value:,.2f}", f"{value / dense:.3f}", seconds])
    return table(["method", "sparsity", "WikiText-2 perplexity", "× dense", "seconds"], cells)


def origins() -> str:
    """What made each run of the tables of runs, in Markdown."""
    rows = [
        [f"[{name}]({name}.md)", one.recipe, one.origin.label if one.origin else ""]
        for name in RUNS
        for one in measured(name)
    ]
    return table(["table", "run", "made by"], rows, words=3)


def trends() -> str:
    """Each of the paper's experiments with its verdict, in short."""
    rows = []
    for finding in findings(RESULTS):
        name = finding.name if finding.here is None else f"[{finding.name}]({finding.name}/{finding.name}.md)"
        rows.append([f"{name}: {finding.title}", finding.paper.partition(" (")[0].rstrip("."), finding.trend])
    return f"\n{table(['experiment', 'the paper found', 'holds here'], rows, words=3)}\n"


def index() -> str:
    """The page of all results, with what made them."""
    return f"{INDEX}{listed(findings(RESULTS))}{RUNS_INDEX}{origins()}"


def past() -> str:
    """Methods by sparsity, on the first text, of the experiment that goes past the paper."""
    found = Result.read(RESULTS / "beyond" / "beyond.json").compared()
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
    (RESULTS / "README.md").write_text(index(), encoding="utf-8")
    (RESULTS / "trends.md").write_text(trends(), encoding="utf-8")
    (RESULTS / "past.md").write_text(past(), encoding="utf-8")
    (RESULTS / "recipes.md").write_text(recipes(), encoding="utf-8")
    (RESULTS / "forms.md").write_text(forms(), encoding="utf-8")
    for page in PAGES:
        page.write_text(with_results(page), encoding="utf-8")


if __name__ == "__main__":
    main()
