"""Table 3 of the paper: pruning and 4-bit quantisation learned together (Joint), against Wanda on a quantised model.

    python -m experiments.table3 smollm2 --data wikitext2=wikitext2.test.raw --data ptb=ptb.test.txt --data c4=c4.jsonl

Writes `experiments/results/table3/table3.json` and `table3.md`. Runs go to `--work`; what this besa left there on this
machine is not done again, so an interrupted run goes on.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from besa.checkpoint.inspection import inspect
from besa.methods.recipe import Recipe
from besa.models.loading import locate
from besa.record import now
from besa.report.markdown import table
from besa.studies.workspace import DENSE, Conditions, Measures, Workspace
from besa.system.devices import resolve_device
from besa.system.machine import machine, versions
from experiments.experiment import Options
from experiments.writing import without_calibration

RESULTS = Path(__file__).parent / "results" / "table3"
RECIPES = {
    "dense": "dense",
    "int4": "4 bits alone",
    "besa-int4": "Joint: BESA and clipping learned together",
    "wanda-int4": "Joint-Wanda: clipping learned, then Wanda",
    "besa-rtn4": "BESA, then rounded to nearest",
}


def main(
    model: str,
    data: Annotated[list[str], typer.Option(help="NAME=FILE to evaluate on (repeatable).")],
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens of each.")] = 512,
    window: Annotated[int, typer.Option(help="Tokens of an evaluation window.")] = 512,
    max_windows: Annotated[int | None, typer.Option(help="Windows of each text.")] = 40,
    dtype: str = "auto",
    work: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("table3"),
) -> None:
    """Run what is missing and write the table."""
    files = {name: file for name, _, file in (pair.partition("=") for pair in data)}
    options = Options(
        Conditions(model, "c4", samples=samples, seqlen=seqlen, dtype=dtype),
        Measures(tuple(files), files, window, max_windows),
        sparsity=0.5,
        seeds=1,
        points=(),
    )
    left, notes = without_calibration(options, work)
    workspace = Workspace(work, options.conditions, replace(options.measures, data=left), keep=True)
    rows = []
    for name in RECIPES:
        print(name, file=sys.stderr, flush=True)
        rows.append(_row(name, workspace))
        print(json.dumps(rows[-1]["perplexity"]), file=sys.stderr, flush=True)
        result = {
            "command": [
                "python",
                "-m",
                "experiments.table3",
                model,
                *(f"--data={pair.partition('=')[0]}=…" for pair in data),
                f"--samples={samples}",
                f"--seqlen={seqlen}",
                f"--window={window}",
                f"--max-windows={max_windows}",
                f"--dtype={dtype}",
            ],
            "model": Path(model).name if Path(model).exists() else model,
            "verdict": _verdict(rows),
            "calibration": f"{samples} × {seqlen} tokens of the embedded c4",
            "window": window,
            "max_windows": max_windows,
            "dtype": dtype,
            "notes": notes,
            "rows": rows,
            "machine": machine(resolve_device("cpu")),
            "versions": versions(),
            "created": now(),
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "table3.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (RESULTS / "table3.md").write_text(_markdown(result), encoding="utf-8")


def _row(name: str, workspace: Workspace) -> dict[str, Any]:
    """Perplexities of a recipe, and what its checkpoint holds."""
    recipe = None if name == DENSE else Recipe.load(name)
    outcome = workspace.outcome(recipe)
    row: dict[str, Any] = {"recipe": name, "perplexity": outcome.scores}
    if recipe is None or outcome.record is None:
        return row
    contents = inspect(locate(workspace.checkpoint(recipe)))
    return row | {
        "sparsity": contents.sparsity,
        "bits_per_weight": contents.bits_per_weight,
        "bits": {part: 8 * size / contents.weights for part, size in contents.parts.items()},
        "seconds": outcome.record.seconds,
        "settings": outcome.record.recipe,
    }


def _verdict(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Whether Joint is below Joint-Wanda on every text, once both are there."""
    found = {row["recipe"]: row["perplexity"] for row in rows}
    if not {"besa-int4", "wanda-int4"} <= found.keys():
        return None
    joint, wanda = found["besa-int4"], found["wanda-int4"]
    said = "; ".join(f"{text}: Joint {joint[text]:,.2f}, Joint-Wanda {wanda[text]:,.2f}" for text in joint)
    return {"found": f"{said}.", "holds": all(joint[text] < wanda[text] for text in joint)}


def _markdown(result: dict[str, Any]) -> str:
    texts = list(result["rows"][0]["perplexity"])
    rows = []
    for row in result["rows"]:
        cells = [f"{row['perplexity'][text]:,.2f}" for text in texts]
        about = ["0 %", "", *cells, ""]
        if row["recipe"] != "dense":
            about = [f"{row['sparsity']:.4%}", f"{row['bits_per_weight']:.3f}", *cells, f"{row['seconds']:,.0f}"]
        rows.append([RECIPES[row["recipe"]], *about])
    return f"\n{table(['method', 'sparsity', 'bits a weight', *texts, 'seconds'], rows)}\n"


if __name__ == "__main__":
    typer.run(main)
