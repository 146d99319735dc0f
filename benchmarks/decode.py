"""Whole models, packed beside dense: tokens a second, file size, memory.

    python -m benchmarks.decode shape 1B 16             # random weights, half of them pruned by magnitude
    python -m benchmarks.decode checkpoint FOLDER       # a checkpoint that `besa prune` wrote, in bfloat16

The second also compares what the two put out in float32: greedy tokens and perplexity. See README.md.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import besa
from benchmarks.processors import ending
from benchmarks.random_model import config, write
from besa.checkpoint.packing import Packing

RESULTS = Path(__file__).parent / "results"
PROMPTS = ("The city lies on the river", "In the year 1905,", "To bake bread you need", "She opened the door and")
GREEDY = 64  # tokens after each prompt
app = typer.Typer(help=__doc__, add_completion=False)
Rounds = Annotated[int, typer.Option(help="Measurements of each kind.")]
Folder = Annotated[Path, typer.Option(help="Where models are written; needs twice their size.")]
TEMPORARY = Path(tempfile.gettempdir())


@app.command()
def shape(name: str, blocks: int, sparsity: float = 0.5, rounds: Rounds = 7, folder: Folder = TEMPORARY) -> None:
    """A Llama of random bfloat16 weights."""
    with _place(folder):
        write(Path("dense"), config(name, blocks), sparsity=sparsity)
        _write(f"decode-{name}-{blocks}", _measured(besa.pack("dense", "packed"), rounds) | {"sparsity": sparsity})


@app.command()
def checkpoint(
    pruned: Path,
    name: Annotated[str, typer.Option(help="Of the result.")] = "smollm2",
    text: str = "wiki",
    rounds: Rounds = 7,
    folder: Folder = TEMPORARY,
) -> None:
    """A pruned checkpoint, run in bfloat16 and compared in float32."""
    pruned = pruned.absolute()
    with _place(folder):
        Path("dense").symlink_to(pruned)
        besa.pack("dense", "exact")
        same = _compared("dense", "exact", text)
        shutil.rmtree("exact")
        found = besa.pack("dense", "packed", dtype="bfloat16")
        _write(f"decode-{name}", _measured(found, rounds) | {"compared": same})


@contextmanager
def _place(folder: Path) -> Iterator[None]:
    """A new working folder, so that models have short names."""
    place = Path(tempfile.mkdtemp(prefix="besa-decode-", dir=folder))
    try:
        with chdir(place):
            yield
    finally:
        shutil.rmtree(place)


def _measured(found: Packing, rounds: int) -> dict[str, Any]:
    measured = besa.bench(["dense", "packed"], rounds=rounds, dtype="bfloat16")
    ratios = {work: {model.form: round(ratio, 3) for model, _, ratio in measured.of(work)} for work in measured.works()}
    shares = {
        work: {model.form: round(timing.limit / timing.seconds, 3) for model, timing, _ in measured.of(work)}
        for work in measured.works()
    }
    return {
        "packing": found.model_dump(),
        "times_as_fast": ratios,
        "share_of_bytes_limit": shares,
        "bench": measured.model_dump(),
    }


def _compared(dense: str, packed: str, text: str) -> dict[str, Any]:
    """Greedy tokens and perplexity of two checkpoints in float32."""
    told = [
        [besa.generate(model, prompt, max_new_tokens=GREEDY, dtype="float32") for prompt in PROMPTS]
        for model in (dense, packed)
    ]
    perplexities = [
        besa.evaluate(model, [text], window=512, max_windows=20, dtype="float32", device="cpu").perplexity[text]
        for model in (dense, packed)
    ]
    return {"prompts": len(PROMPTS), "tokens": GREEDY, "same_greedy_text": told[0] == told[1], text: perplexities}


def _write(name: str, result: dict[str, Any]) -> None:
    text = json.dumps(result | {"threads": torch.get_num_threads()}, indent=2)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}{ending()}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    app()
