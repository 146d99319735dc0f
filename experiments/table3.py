"""Table 3 of the paper: pruning and 4-bit quantisation learned together (Joint), against Wanda on a quantised model.

    python -m experiments.table3 smollm2 --data wikitext2=wikitext2.test.raw --data ptb=ptb.test.txt --data c4=c4.jsonl

Writes `experiments/results/table3/table3.json` and `table3.md`. Checkpoints go to `--work`; what is there already is
not done again, so an interrupted run goes on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import besa
from besa.checkpoint.inspection import inspect
from besa.data.documents import read_documents
from besa.models.loading import locate
from besa.record import RunRecord, now
from besa.report.markdown import table
from besa.system.machine import machine, resolve_device, versions

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
    work: Annotated[Path, typer.Option(help="Folder for checkpoints.")] = Path("table3"),
) -> None:
    """Run what is missing and write the table."""
    calibrated = set(read_documents("c4"))
    texts = []
    for pair in data:
        name, _, file = pair.partition("=")
        texts.append(str(_text(work, name, file, calibrated)))
    rows = []
    for recipe in RECIPES:
        folder = work / recipe
        if recipe != "dense" and not folder.exists():
            print(f"pruning by {recipe}", file=sys.stderr, flush=True)
            besa.compress(model, recipe, "c4", out=folder, samples=samples, seqlen=seqlen, dtype=dtype, resume=True)
        rows.append(_row(recipe, model, folder, texts, window, max_windows, dtype))
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
            "rows": rows,
            "machine": machine(resolve_device("cpu")),
            "versions": versions(),
            "created": now(),
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "table3.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (RESULTS / "table3.md").write_text(_markdown(result), encoding="utf-8")


def _text(work: Path, name: str, file: str, calibrated: set[str]) -> Path:
    """The text of a data set as the papers join it, under its name; without documents calibrated on."""
    path = work / f"{name}.txt"
    if not path.exists():
        if name == "ptb":
            text = " ".join(line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines())
        elif file.endswith(".jsonl"):
            text = " ".join(document for document in read_documents(file) if document not in calibrated)
        else:
            text = Path(file).read_text(encoding="utf-8")
        work.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path


def _row(
    recipe: str, model: str, folder: Path, texts: list[str], window: int, max_windows: int | None, dtype: str
) -> dict[str, Any]:
    measured = folder.with_suffix(".json")
    if measured.exists():
        row: dict[str, Any] = json.loads(measured.read_text(encoding="utf-8"))
        return row
    dense = recipe == "dense"
    evaluation = besa.evaluate(model if dense else folder, texts, window=window, max_windows=max_windows, dtype=dtype)
    row = {"recipe": recipe, "perplexity": evaluation.perplexity}
    if not dense:
        contents, record = inspect(locate(folder)), RunRecord.read(folder / "besa_run.json")
        row |= {
            "sparsity": contents.sparsity,
            "bits_per_weight": contents.bits_per_weight,
            "bits": {part: 8 * size / contents.weights for part, size in contents.parts.items()},
            "seconds": record.seconds,
            "settings": record.recipe,
        }
    measured.write_text(json.dumps(row), encoding="utf-8")
    return row


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
