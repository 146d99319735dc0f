"""What a GPU would wait for, counted on the pretend accelerator of the tests: launches, syncs, and bytes that travel.

    python -m benchmarks.waits    # writes results/waits.json

The model is the tiny Llama of the tests, on 8 sequences of 64 tokens. Launches and syncs of a block hardly depend on
the sizes; the bytes show what travels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from besa import compress
from besa.record import now
from besa.system.machine import versions
from tests import pretend

RESULTS = Path(__file__).parent / "results"
TINY = Path(__file__).parents[1] / "tests" / "assets" / "tiny-llama"
RECIPES = ("wanda", "sparsegpt", "besa", "besa-int4", "fast", "best")


def counted(recipe: str) -> dict[str, int]:
    """The counts of a whole run by a recipe, of a model in memory."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    pretend.reset()
    text = str(TINY / "calibration.txt")
    compress(model, recipe, text, samples=8, seqlen=64, batch=4, tokenizer=tokenizer, device="pretend")
    counts = pretend.counts
    return {
        "blocks": len(model.model.layers),
        "launches": counts.launches.total(),
        "syncs": counts.syncs.total(),
        "to_device_bytes": sum(counts.to_device),
        "to_host_bytes": sum(counts.to_host),
    }


def main(
    only: Annotated[list[str] | None, typer.Option(help="Recipes to run; no file is written then.")] = None,
) -> None:
    """Count, print a table, and write it."""
    torch.set_num_threads(1)
    rows = {}
    print("| recipe | launches | syncs | to the device, kB | to the host, kB |\n|---|---:|---:|---:|---:|")
    for recipe in only or RECIPES:
        row = rows[recipe] = counted(recipe)
        moved = f"{row['to_device_bytes'] / 1000:,.0f} | {row['to_host_bytes'] / 1000:,.0f}"
        print(f"| {recipe} | {row['launches']:,} | {row['syncs']:,} | {moved} |", flush=True)
    if not only:
        result = {"created": now(), "versions": versions(), "recipes": rows}
        (RESULTS / "waits.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
