"""Peak memory of a pruning run: flat in the depth of the model, and small beside its weights.

    python -m benchmarks.memory depth            # 4, 8, 16, 32 blocks of one shape
    python -m benchmarks.memory shape 7B 32      # one run of a large model

Every run is a process of its own, on random weights; see README.md.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.random_model import TOKENIZER, config, write

RESULTS = Path(__file__).parent / "results"
TEMPORARY = Path(tempfile.gettempdir())
app = typer.Typer(help=__doc__, add_completion=False)
Recipe = Annotated[str, typer.Option()]
Samples = Annotated[int, typer.Option(help="Calibration sequences.")]
Seqlen = Annotated[int, typer.Option(help="Tokens of each.")]
Folder = Annotated[Path, typer.Option(help="Where models are written; needs three times their size.")]


@app.command()
def depth(recipe: Recipe = "besa", samples: Samples = 4, seqlen: Seqlen = 128, folder: Folder = TEMPORARY) -> None:
    """Peak memory for 4, 8, 16 and 32 blocks of 61 million weights each."""
    runs = [_measure("1B", blocks, recipe, samples, seqlen, folder) for blocks in (4, 8, 16, 32)]
    peaks = [run["peak_memory_bytes"] for run in runs]
    _write(f"memory-depth-{recipe}.json", {"runs": runs, "spread": max(peaks) / min(peaks) - 1})


@app.command()
def shape(
    name: str,
    blocks: int,
    recipe: Recipe = "besa",
    samples: Samples = 4,
    seqlen: Seqlen = 128,
    folder: Folder = TEMPORARY,
) -> None:
    """Peak memory and seconds a block of one model."""
    _write(f"memory-{name}-{recipe}.json", _measure(name, blocks, recipe, samples, seqlen, folder))


def _measure(name: str, blocks: int, recipe: str, samples: int, seqlen: int, folder: Path) -> dict[str, Any]:
    """Write a model, ask for a plan, prune it, and remove both."""
    place = Path(tempfile.mkdtemp(prefix="besa-memory-", dir=folder))
    try:
        write(place / "model", config(name, blocks))
        settings = ["--recipe", recipe, "--samples", str(samples), "--seqlen", str(seqlen), "--device", "cpu"]
        plan = _besa("plan", str(place / "model"), *settings, "--json", str(place / "plan.json"))
        text = ["--calibration", str(TOKENIZER / "calibration.txt")]
        seconds = _besa("prune", str(place / "model"), str(place / "out"), *settings, *text)
        record = json.loads((place / "out" / "besa_run.json").read_text())
        planned = json.loads((place / "plan.json").read_text())
        size = sum(path.stat().st_size for path in (place / "model").glob("*.safetensors"))
    finally:
        shutil.rmtree(place)
    per_block = sorted(block["seconds"] for block in record["blocks"])[blocks // 2]
    return {
        "shape": name,
        "blocks": blocks,
        "checkpoint_bytes": size,
        "recipe": recipe,
        "calibration": f"{samples} × {seqlen} tokens",
        "peak_memory_bytes": record["peak_memory_bytes"],
        "planned_memory_bytes": planned["memory_bytes"],
        "seconds": round(seconds, 1),
        "planning_seconds": round(plan, 1),
        "seconds_per_block_median": round(per_block, 2),
        "sparsity": record["sparsity"],
        "machine": record["machine"],
        "versions": record["versions"],
    }


def _besa(*arguments: str) -> float:
    """Seconds that a besa command took."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "besa", *arguments], check=True)
    return time.perf_counter() - began


def _write(name: str, result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    app()
