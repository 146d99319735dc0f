"""What each of several ranks measures: `torchrun --nproc-per-node 2 -m tests.measuring_on_ranks FOLDER`."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import besa
from besa.cli import app
from besa.data import questions
from besa.methods.recipe import Recipe
from besa.record import BlockRecord, RunRecord
from besa.studies import workspace
from besa.system import ranks
from besa.system.joining import joined
from tests.tiny_questions import write

MODEL = Path(__file__).parent / "assets" / "tiny-llama"
EVALUATE = [
    *("eval", str(MODEL), "--ppl", str(MODEL / "heldout.txt"), "--window", "64", "--max-windows", "11"),
    *("--tasks", "piqa,arc_easy", "--batch", "4"),
]
SIZES = {"samples": 5, "seqlen": 32, "batch": 2}
FEW = ["allocation.steps=3", "allocation.tolerance=0"]  # all of them are taken
RECIPES = {  # by name: a shipped recipe, and settings
    "wanda": ("wanda", []),
    "sparsegpt": ("sparsegpt", []),
    "sparsegpt-fixed": ("sparsegpt", ["reconstruction.mask=fixed"]),
    "fast": ("fast", []),
    "best": ("best", ["finetune={method: adam, epochs: 1}", "distill.method=none"]),
    "distilled": ("wanda", ["distill={method: kl, learns: both, epochs: 1, rate: 1.0e-6}"]),
    "besa": ("besa", FEW),
    "attn-mlp": ("besa", [*FEW, "allocation.granularity=attn-mlp", "skip=['*.k_proj']"]),
    "two-blocks": ("besa-layerwise", [*FEW, "allocation.granularity=two-blocks", "reconstruction.method=cg"]),
    "joint": ("besa-int4", [*FEW, "quantization.group=32"]),
    "first": ("besa-int4", [*FEW, "quantization.clipping=first", "quantization.ranks=quantized"]),
    "mixed": ("wanda", ["allocation={method: nm, mixed: true}"]),
}


def recipe(name: str) -> Recipe:
    """One of `RECIPES`."""
    shipped, settings = RECIPES[name]
    return Recipe.load(shipped, None, settings)


def comparison(text: Path) -> list[str]:
    """A comparison of four runs and the dense model."""
    sizes = ["--calibration", str(text), "--samples", "4", "--seqlen", "32", "--window", "32", "--max-windows", "4"]
    recipes = ["--recipes", "magnitude,wanda", "--sparsity", "0.5", "--seeds", "2"]
    return ["compare", str(MODEL), *recipes, "--ppl", str(MODEL / "heldout.txt"), *sizes]


def with_tiny_questions(folder: Path, patch: Any) -> None:
    """The questions of tasks are six each, written to the folder."""
    patch(questions, "fetch", lambda name, progress: write(name.removeprefix("zero-shot-"), folder))


def call(arguments: list[str]) -> None:
    """The command line, in this process."""
    app(arguments, prog_name="besa", standalone_mode=False)


def traffic(folder: Path) -> dict[str, list[dict[str, int]]]:
    """Bytes that a rank sends in each block by phase, those of JSON aside, by name of the recipe."""
    all_of, model, text = ranks.all_of, folder / "model", str(folder / "text.txt")

    def uncounted(thing: Any) -> list[Any]:
        before = ranks._group.sent
        things = all_of(thing)
        ranks._group.sent = before
        return things

    with patch.object(ranks, "all_of", uncounted):
        records = {name: besa.compress(model, recipe(name), text, **SIZES).record for name in RECIPES}
    return {name: [_of_block(record, block) for block in record.blocks] for name, record in records.items()}


def _of_block(record: RunRecord, block: BlockRecord) -> dict[str, int]:
    """What was sent for a block; its share of what was sent for the whole model, without that of the final norm."""
    if record.distilling is None:
        return block.sent
    steps, channels = 4, 96  # of the four sequences that are learned from, if not in one step
    steps = -(-steps // record.recipe["distill"]["batch"])
    sent = record.distilling.sent["distill"] - steps * (4 * channels + 8)
    return block.sent | {"distill": round(sent / len(record.blocks))}


def main(folder: Path) -> None:
    """Leaves the results of the commands, and `RANK.json`: what a rank did."""
    pruned, compress = [], workspace.compress
    with joined():
        own = folder / f"{ranks.number()}"
        own.mkdir()
        with_tiny_questions(own, setattr)
        call([*EVALUATE, "--json", str(own / "eval.json")])
        workspace.compress = lambda *a, **k: pruned.append(k["out"].name) or compress(*a, **k)
        call([*comparison(folder / "text.txt"), "--out", str(folder / "compare")])
        found = {"pruned": pruned, "sent": traffic(folder)}
        (folder / f"{ranks.number()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
