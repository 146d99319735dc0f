"""What each of several ranks does in a folder; torchrun starts them: `torchrun … -m tests.on_ranks FOLDER`."""

import json
import sys
from pathlib import Path
from typing import Any

from besa.cli import app
from besa.data import questions
from besa.studies import workspace
from besa.system import ranks
from besa.system.joining import joined
from tests.tiny_questions import write

MODEL = Path(__file__).parent / "assets" / "tiny-llama"
EVALUATE = [
    *("eval", str(MODEL), "--ppl", str(MODEL / "heldout.txt"), "--window", "64", "--max-windows", "11"),
    *("--tasks", "piqa,arc_easy", "--batch", "4"),
]


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
        (folder / f"{ranks.number()}.json").write_text(json.dumps({"pruned": pruned}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
