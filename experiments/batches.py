"""What several sequences a learning step buy: batch against number of steps, for BESA's rates and for fine-tuning.

    python -m experiments.all --only batches-smollm2-50

The other cells of a study are compared with its first, seed by seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

from besa.methods.recipe import Recipe
from besa.models.source import EMBEDDED
from besa.report.markdown import table
from besa.studies.rows import cell
from experiments.experiment import ERRORS, Case, Experiment, Found, Made, Options, by_method, errors
from experiments.judging import Verdict, judged
from experiments.settings import DEFAULTS

TINY = Path(__file__).parent.parent / "tests" / "assets" / "tiny-llama"
STEPS, TUNING = "steps taken", "held-out loss"  # means of blocks, beside the scores of all experiments
BATCHES = (2, 4, 8)


def learning(*pairs: tuple[int, int], tolerance: float = 0.0) -> dict[str, list[str]]:
    """Cells of BESA's rates.

    Args:
        pairs: of batch and steps.
        tolerance: at which a run stops early; larger batches have shorter passes and so stop earlier.
    """
    ending = f", tolerance {tolerance:g}" if tolerance else ""
    return {
        f"batch {batch}, {steps} steps{ending}": [
            "allocation.crop=0.5", f"allocation.batch={batch}", f"allocation.steps={steps}",
            f"allocation.tolerance={tolerance}"
        ]
        for batch, steps in pairs
    }  # fmt: skip


def tuning(batch: int, epochs: int, rate: float = 1e-3) -> dict[str, list[str]]:
    """A cell of fine-tuning; `rate` is that of the first step."""
    settings = {"method": "adam", "batch": batch, "epochs": epochs, "rate": f"{rate:.2e}"}
    label = f"batch {batch}, {epochs} epochs, rate {rate:.2g}"
    return {label: [f"finetune.{key}={value}" for key, value in settings.items()]}


GRID = (
    learning((1, 88), (1, 176), (1, 44), (1, 22), (1, 11), *product(BATCHES, (88, 44, 22, 11)))
    | learning(*((batch, 88) for batch in BATCHES), tolerance=0.01)
)  # fmt: skip
EPOCHS = 4  # of a batch of 1
TUNINGS = (
    tuning(1, EPOCHS)
    | tuning(1, 1, 4e-3)
    | {label: own for batch in BATCHES for label, own in tuning(1, EPOCHS, 1e-3 * batch).items()}
    | {label: own for rate in (8e-3, 16e-3) for label, own in tuning(4, EPOCHS, rate).items()}
    | tuning(8, EPOCHS, 16e-3)
    | {label: own for batch in BATCHES for label, own in tuning(batch, EPOCHS).items()}
    | {label: own for batch in BATCHES for label, own in tuning(batch, EPOCHS, 1e-3 * sqrt(batch)).items()}
    | {label: own for batch in BATCHES for label, own in tuning(batch, EPOCHS, 1e-3 * batch).items()}
    | {label: own for batch in BATCHES for label, own in tuning(batch, batch * EPOCHS).items()}
)


def scores(outcome: Made) -> dict[str, float]:
    """Perplexities, reconstruction errors, and where a run learned: its steps, or what fine-tuning reached."""
    found = outcome.scores | errors(outcome)
    blocks = outcome.record.blocks if outcome.record else []
    if any(block.losses for block in blocks):
        found[STEPS] = mean(len(block.losses) for block in blocks)
    if any(block.finetuning for block in blocks):
        found[TUNING] = mean(min(block.finetuning) for block in blocks)
    return found


def verdict(found: Found) -> Verdict:
    """Some cell is better than the first."""
    first, *others = found.rows
    against = {label: judged(found.changes(label, first), most=0) for label in others}
    better = [label for label, one in against.items() if one.holds(len(others))]
    least = min(against, key=lambda label: against[label].mean)
    told = (
        f"{len(better)} of {len(others)} cells are better than {first}; the least is {least}, {against[least].words()}"
    )
    worse = all(one.holds() is False for one in against.values())
    holds = True if better else False if worse else None
    return Verdict(f"{found.text}: {told}.", holds, against[least].mean < 0)


def shown(found: Found) -> str:
    """Scores of each cell, and their changes against the first."""
    (first, base), *_ = found.rows.items()
    texts = [score for score in base.mean if score not in (*ERRORS, STEPS, TUNING)]
    compared = [*texts, ERRORS[1], *([TUNING] if TUNING in base.mean else [])]
    columns = [*([STEPS] if STEPS in base.mean else []), *compared]
    head = ["cell", "seeds", *columns, *(f"{score}, change" for score in compared)]
    cells = [
        [label, str(one.seeds), *(cell(one, score) for score in columns)]
        + [_percent(found.changes(label, first, score)) for score in compared]
        for label, one in found.rows.items()
    ]
    return f"{table(head, cells)}\n± is the standard deviation over seeds; a change is that against the first row.\n"


def _percent(changes: Sequence[float]) -> str:
    spread = f" ± {stdev(changes):.1f}" if len(changes) > 1 else ""
    return f"{mean(changes):+.1f} %{spread}"


def study(name: str, recipe: str, cells: Mapping[str, Sequence[str]], sparsity: float = 0.5) -> Experiment:
    """Runs of one recipe with several settings, by label; on the tests' model or on the embedded one."""

    def cases(options: Options) -> list[Case]:
        return [Case(label, Recipe.load(recipe, options.sparsity, own)) for label, own in cells.items()]

    tiny = name.startswith("tiny")
    return Experiment(
        f"batches-{name}",
        f"Batches: {recipe} at {sparsity:.0%}, {name.partition('-')[0]}",
        cases,
        verdict,
        by_method,
        texts=(str(TINY / "heldout.txt"), "wiki") if tiny else ("wiki",),
        scores=scores,
        claim="That a cell is better than the first",
        settings=(DEFAULTS,),
        models=(str(TINY) if tiny else EMBEDDED,),
        sparsity=sparsity,
        table=shown,
        module="batches",
    )


STUDIES = (
    study("tiny-50", "besa", GRID),
    study("tiny-70", "besa", learning((1, 88), (1, 44), (1, 22), *product(BATCHES, (44, 22))), 0.7),
    study("tiny-finetune", "fast", TUNINGS),
    study("smollm2-50", "besa", learning((1, 88), (1, 44), (4, 22), (2, 44), (8, 11), (1, 22), (4, 44))),
    study("smollm2-finetune", "fast", tuning(1, EPOCHS) | tuning(4, EPOCHS, 4e-3) | tuning(1, EPOCHS, 4e-3)),
)
