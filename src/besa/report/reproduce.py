"""How to make a run again: its command lines and its recipe."""

from __future__ import annotations

import re
import shlex
from itertools import chain, count
from typing import Any

import yaml

from besa.data.domains import DOMAINS
from besa.data.embedded import EMBEDDED
from besa.errors import BesaError
from besa.evaluation.result import EVALUATION_NAME, Evaluation
from besa.evaluation.texts import HUB, TEST_SETS
from besa.methods.recipe import Recipe
from besa.methods.shipped import shipped
from besa.record import RunRecord
from besa.report.results import Entry
from besa.report.runs import SIMULATION_NAME, blocks_asked
from besa.storage.names import pinned

WIDTH = 96  # of a command line on the page


def folders(labels: list[str]) -> list[str]:
    """A plain name for the folder of each run, all distinct."""
    names: list[str] = []
    for label in labels:
        name = re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-") or "run"
        others = (f"{name}-{number}" for number in count(2))
        names.append(next(one for one in chain([name], others) if one not in names))
    return names


def prune(entry: Entry, record: RunRecord) -> str:
    """The `besa prune` that repeats the run, all that matters spelled out, on a CPU the number of threads too."""
    device, threads = record.machine.get("device", "cpu"), record.machine.get("threads")
    model = record.model.get("source") or record.model.get("architecture") or "MODEL"
    return _line(
        ["prune", pinned(str(model), record.model.get("revision")), _pruned(entry)],
        recipe=record.recipe["name"] if is_shipped(record) else f"{entry.folder}.yaml",
        sparsity=None if blocks_asked(record) else record.recipe.get("sparsity"),
        calibration=record.calibration.get("source"),
        samples=record.calibration.get("samples"),
        seqlen=record.calibration.get("seqlen"),
        bos=None if (bos := record.calibration.get("bos")) is None else "yes" if bos else "no",
        chat=record.calibration.get("chat"),
        seed=record.seed,
        batch=record.batch,
        dtype=record.model.get("dtype"),
        device=device,
        dequantized=record.dequantized,
        processes=(record.machines, record.ranks // record.machines),
        variables={"OMP_NUM_THREADS": threads} if device == "cpu" and threads else {},
    )


def form(entry: Entry, record: RunRecord) -> list[str]:
    """The commands that pack or shrink what `besa prune` wrote, if that was done."""
    steps = entry.run.form.steps(_pruned(entry), entry.folder, record.model.get("dtype"))
    return [_line(words) for words in steps]


def _pruned(entry: Entry) -> str:
    """The folder that `besa prune` writes."""
    return f"{entry.folder}-pruned" if str(entry.run.form) else entry.folder


def evaluate(entry: Entry) -> str | None:
    """The `besa eval` that measures the run again; texts that were files stand under their names."""
    measured = entry.run.measured
    if measured is None or not (measured.perplexity or measured.zero_shot):
        return None
    zero_shot = measured.zero_shot
    details = [one for texts in (measured.details, *measured.other_windows.values()) for one in texts.values()]
    return _line(
        ["eval", pinned(measured.model, measured.revision) if entry.run.dense else entry.folder],
        ppl=entry.run.texts,
        data=[f"{name}={file}" for name, file in _set_files(measured).items()],
        window=",".join(map(str, [measured.window, *measured.other_windows])) if entry.run.texts else None,
        max_windows=max((one.windows for one in details if one.windows), default=None),
        bos=measured.bos if measured.bos != "auto" else None,
        dtype=measured.dtype,
        tasks=",".join(zero_shot.tasks) if zero_shot else None,
        limit=zero_shot.limit if zero_shot else None,
        hub=zero_shot is not None and zero_shot.source == "hub",
        json=f"{entry.folder}/{EVALUATION_NAME}",
    )


def simulate(entry: Entry) -> str | None:
    """The `besa simulate` that simulates the run again."""
    simulated = entry.run.simulated
    if simulated is None:
        return None
    return _line(
        ["simulate", pinned(simulated.model, simulated.revision) if entry.run.dense else entry.folder],
        tokens=",".join(map(str, simulated.block.cycles_memory)),
        json=f"{entry.folder}/{SIMULATION_NAME}",
    )


def report(entries: list[Entry]) -> str:
    """The `besa report` that makes the page again."""
    return _line(["report", *(entry.folder for entry in entries)], out="report.html")


def files(entries: list[Entry]) -> list[str]:
    """Texts that were files of the user's."""
    names = dict.fromkeys(text for entry in entries for text in entry.run.texts)
    own = [name for name in names if name not in {*EMBEDDED, *TEST_SETS, *DOMAINS} and not name.startswith("hf:")]
    of_sets = (_set_files(entry.run.measured).values() for entry in entries if entry.run.measured)
    return list(dict.fromkeys([*own, *chain.from_iterable(of_sets)]))


def _set_files(measured: Evaluation) -> dict[str, str]:
    """The local files that stood for test sets, by the set."""
    sources = {name: measured.sources.get(name, HUB) for name in measured.perplexity if name in TEST_SETS}
    return {name: source for name, source in sources.items() if source != HUB}


def _line(
    words: list[str], variables: dict[str, Any] | None = None, processes: tuple[int, int] = (1, 1), **options: Any
) -> str:
    """A command, continued where it grows long; a list is an option given several times, True a flag.

    Args:
        words: that come first.
        variables: of the environment, by name.
        processes: machines, and processes on each.
        options: by name.
    """
    machines, each = processes
    start = ["torchrun", *(["--nnodes", str(machines)] if machines > 1 else []), "--nproc-per-node", str(each)]
    program = ["besa"] if machines * each == 1 else [*start, "-m", "besa"]
    lines = [shlex.join([*(f"{name}={value}" for name, value in (variables or {}).items()), *program, *words])]
    for option, value in options.items():
        for one in value if isinstance(value, list) else [] if value is None or value is False else [value]:
            more = shlex.join([f"--{option.replace('_', '-')}", *([] if one is True else [str(one)])])
            if len(lines[-1]) + len(more) < WIDTH:
                lines[-1] += f" {more}"
            else:
                lines[-1] += " \\"
                lines.append(f"  {more}")
    return "\n".join(lines)


def is_shipped(record: RunRecord) -> bool:
    """Whether the recipe is one that comes with besa, in every setting but the sparsity."""
    name = record.recipe.get("name")
    if name not in shipped():
        return False
    try:
        recipe = Recipe.load(name, record.recipe.get("sparsity"))
    except BesaError:
        return False
    samples = record.calibration.get("samples", 0)
    settled = recipe.settled(record.ranks, samples, {})  # as a run settles what is left to it
    return record.recipe in [one.model_dump(mode="json") for one in (recipe, settled)]


def recipe_yaml(record: RunRecord) -> str:
    """The recipe with every setting spelled out."""
    return yaml.safe_dump(record.recipe, sort_keys=False, allow_unicode=True)
