"""Table 4 of the paper: cycles of pruned models on the simulated ViTCoD accelerator, from their checkpoints alone.

    python -m experiments.all --only table4

For each method the published formula, the corrected one, the best threshold, the work bound, and the larger of loading
and computing for several numbers of tokens; beside them random masks on weights as large as LLaMA-7B's.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

import besa
from besa.checkpoint.walk import StoredWeight
from besa.models.kinds import shortened
from besa.report.curves import Curve, Panel
from besa.report.markdown import table
from besa.simulator import described, simulate_weight
from besa.simulator.model import LinearSimulation, MeanSimulation
from experiments.experiment import Case, Experiment, Found, Made, Options, numbers
from experiments.judging import Verdict, judged, ruled

RANDOM = [
    *((4096, 4096, sparsity, seed) for sparsity in (0.49, 0.5, 0.505, 0.54) for seed in range(3)),
    *((11008, 4096, sparsity, 0) for sparsity in (0.48, 0.5)),
]
TOKENS = (1, 8, 32, 128, 512)
BASELINES = ("wanda", "sparsegpt")
PUBLISHED, CORRECTED = map(described, ("published", "corrected"))


def cases(options: Options) -> list[Case]:
    """The paper's methods, and magnitude."""
    return [*(Case(name, options.baseline(name)) for name in ("magnitude", *BASELINES)), Case("besa", options.besa())]


def simulated(checkpoint: Path) -> dict[str, Any]:
    """Cycles of each kind of linear, and of all linears of a block together; means over blocks."""
    return besa.simulate(checkpoint, TOKENS).model_dump(mode="json", include={"kinds", "block"})


def scores(made: Made) -> dict[str, float]:
    """Speed-up over the same weights without zeros, all linears of a block together, by figure."""
    return {described(figure): gain or 0.0 for figure, gain in _block(made).speedup.items()}


def verdict(found: Found) -> Verdict:
    """By the published formula BESA gains more than Wanda and SparseGPT."""
    against = {other: judged(found.changes("besa", other, PUBLISHED), least=0) for other in BASELINES}
    told = ", ".join(f"{other} {one.words()}" for other, one in against.items())
    gains = "; ".join(f"{figure}: {numbers(found, list(found.rows), figure)}" for figure in (PUBLISHED, CORRECTED))
    return ruled(
        f"Times dense, all linears together, {gains}; by the published formula besa against {told}.",
        list(against.values()),
    )


def panels(found: Found) -> list[Panel]:
    """The speed-ups of whole blocks by the four figures that leave out memory, and with it."""
    figures = list(next(iter(found.rows.values())).mean)
    return [
        Panel(
            [
                Curve(label, color, list(range(len(own))), [row.mean[figure] for figure in own])
                for color, (label, row) in enumerate(found.rows.items())
            ],
            "",
            "speed-up over dense",
            ticks=own,
        )
        for own in (figures[: -len(TOKENS)], figures[-len(TOKENS) :])
    ]


def shown(found: Found) -> str:
    """Speed-ups of whole blocks, then random masks, then cycles by linear of the first seed."""
    gains = [
        [figure, *(f"{row.mean[figure]:.2f}×" for row in found.rows.values())]
        for figure in next(iter(found.rows.values())).mean
    ]
    masks = [
        [
            f"{own.shape[0]} × {own.shape[1]}",
            f"{own.sparsity:.1%}",
            str(seed),
            *(f"{cycles:,}" for cycles in (own.cycles_published, own.cycles_corrected, own.cycles_bound)),
        ]
        for own, (*_, seed) in zip(random(), RANDOM, strict=True)
    ]
    columns = {
        label: [*map(MeanSimulation.model_validate, first.looked["kinds"]), _block(first)]
        for label, (first, *_) in found.outcomes.items()
    }
    any_method = next(iter(columns.values()))
    cycles = []
    for figure in any_method[-1].each():
        rows = {"dense": [column.dense.each()[figure] for column in any_method]}
        rows |= {label: [column.each()[figure] for column in own] for label, own in columns.items()}
        cycles += [[described(figure), label, *(f"{n:,.1f}" for n in numbers_)] for label, numbers_ in rows.items()]
    cycles += [["sparsity", label, *(f"{column.sparsity:.2%}" for column in own)] for label, own in columns.items()]
    rules = [PUBLISHED, CORRECTED]
    names = shortened([column.name for column in any_method[:-1]])
    return "\n".join(
        [
            table(["speed-up over dense", *found.rows], gains),
            "All linears of a block together. Cycles of random masks, the same number of zeros in each row:\n",
            table(["rows × columns", "sparsity", "seed", *rules, "work bound"], masks),
            "Cycles of seed 0, mean over blocks:\n",
            table(["figure", "method", *names, "all"], cycles, words=2),
        ]
    )


@cache
def random() -> list[LinearSimulation]:
    """Weights of which each row has lost the same number of weights, at random."""
    found = []
    for rows, columns, sparsity, seed in RANDOM:
        generator = torch.Generator().manual_seed(seed)
        zero_OI = torch.zeros(rows, columns, dtype=torch.bool)
        for own_OI in zero_OI.split(512):
            order = torch.rand(own_OI.shape, generator=generator)
            own_OI.scatter_(1, order.topk(round(sparsity * columns), dim=1).indices, True)
        found.append(simulate_weight(StoredWeight("random", "random", zero_OI, {}), TOKENS, besa.Accelerator()))
    return found


def _block(made: Made) -> MeanSimulation:
    return MeanSimulation.model_validate(made.looked["block"])


EXPERIMENT = Experiment(
    "table4",
    "Table 4: simulated cycles",
    cases,
    verdict,
    panels,
    texts=(),
    scores=scores,
    look=simulated,
    table=shown,
)
