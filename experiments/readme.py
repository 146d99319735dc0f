"""Put measured tables into the README: `python -m experiments.readme` makes them from run records and evaluations.

A marker pair `<!-- results:NAME -->` … `<!-- /results -->` holds `experiments/results/NAME.md`; the table in it is made
of the `besa_run.json` and `besa_eval.json` of its runs. Nothing of it is typed by hand but the words.
`past.md` is made of `beyond/beyond.json`; `experiments/results/README.md` lists the paper's tables and figures with
the verdicts of the experiments.
"""

import json
import re
from pathlib import Path

from experiments.paper import findings, markdown

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
RUNS = {
    "50": ("demo-full-50", ["dense", "magnitude", "wanda", "sparsegpt", "besa-layerwise", "besa"]),
    "70": ("smollm2-70", ["wanda", "besa"]),
}
INDEX = """# The paper's tables and figures

Made by `python -m experiments.readme` of the result files beside it; `python -m experiments` shows the same.

"""
MARKED = re.compile(r"(<!-- results:([\w/]+) -->\n).*?(<!-- /results -->)", re.DOTALL)
TABLE = re.compile(r"^\|.*?\n(?!\|)", re.DOTALL | re.MULTILINE)
DENSE = RESULTS / "demo-full-50" / "dense"


def perplexity(folder: Path) -> float:
    """On the one text that a run was evaluated on."""
    (value,) = json.loads((folder / "besa_eval.json").read_text(encoding="utf-8"))["perplexity"].values()
    return float(value)


def table(name: str) -> str:
    """Sparsity, perplexity and seconds of some runs, in Markdown."""
    folder, methods = RUNS[name]
    dense = perplexity(DENSE)
    lines = ["| method | sparsity | WikiText-2 perplexity | × dense | seconds |", "|---|---:|---:|---:|---:|"]
    for method in dict.fromkeys(["dense", *methods]):
        place = DENSE if method == "dense" else RESULTS / folder / method
        sparsity, seconds = "0 %", ""
        if method != "dense":
            record = json.loads((place / "besa_run.json").read_text(encoding="utf-8"))
            sparsity, seconds = f"{record['sparsity']:.4%}", f"{record['seconds']:,.0f}"
        value = perplexity(place)
        lines.append(f"| {method} | {sparsity} | {value:,.2f} | {value / dense:.3f} | {seconds} |")
    return "\n".join(lines) + "\n"


def trends() -> str:
    """Each of the paper's experiments with its verdict, in short."""
    lines = ["", "| experiment | the paper found | holds here |", "|---|---|---|"]
    for finding in findings(RESULTS):
        place = RESULTS.relative_to(ROOT) / finding.name / f"{finding.name}.md"
        name = finding.name if finding.here is None else f"[{finding.name}]({place})"
        lines.append(f"| {name}: {finding.title} | {finding.paper.partition(' (')[0].rstrip('.')} | {finding.trend} |")
    return "\n".join([*lines, "", ""])


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
    lines = ["", f"| {head} | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
    for name in dict.fromkeys(name for name, column in scores if column):
        own = [scores.get((name, column)) for column in columns]
        lines.append(f"| {name} | {' | '.join('' if value is None else f'{value:,.2f}' for value in own)} |")
    return "\n".join([*lines, "", ""])


def with_results(text: str) -> str:
    """`text` with the present content of every marked result; of an experiment's page, its table alone."""
    return MARKED.sub(lambda match: match[1] + _content(match[2]) + match[3], text)


def _content(name: str) -> str:
    page = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    if not page.startswith("# "):
        return page
    table = TABLE.search(page)
    assert table is not None, f"{name}.md has no table"
    return f"\n{table[0]}\n"


def main() -> None:
    """Bring the tables and the README up to date."""
    for name in RUNS:
        path = RESULTS / f"{name}.md"
        before, after = TABLE.split(path.read_text(encoding="utf-8"), maxsplit=1)
        path.write_text(before + table(name) + after, encoding="utf-8")
    (RESULTS / "README.md").write_text(INDEX + markdown(findings(RESULTS)), encoding="utf-8")
    (RESULTS / "trends.md").write_text(trends(), encoding="utf-8")
    (RESULTS / "past.md").write_text(past(), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(with_results(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
