"""The command line of every experiment, and the runs it asks for; these are in one workspace, so none is made twice."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from besa.cli.tracking import show_progress
from besa.errors import BesaError
from besa.studies.rows import row
from besa.studies.workspace import Conditions, Measures, Outcome, Workspace
from besa.system.devices import named_device
from experiments.experiment import Experiment, Found, Options, linear_names
from experiments.writing import RESULTS, without_calibration, write


def run(experiment: Experiment) -> None:
    """The command line of an experiment."""

    def command(
        model: Annotated[
            str, typer.Option(help="Hugging Face id, folder, .gguf file, or smollm2 (embedded).")
        ] = "smollm2",
        samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
        seqlen: Annotated[int, typer.Option(help="Tokens of each.")] = 2048,
        calibration: Annotated[str, typer.Option(help="Text to calibrate on.")] = "c4",
        sparsity: Annotated[float, typer.Option(help="Share of the prunable weights, where it is not varied.")] = 0.5,
        seeds: Annotated[int, typer.Option(help="Runs of each case.")] = 1,
        points: Annotated[str, typer.Option(help="What is varied, by commas, where something is.")] = "",
        ppl: Annotated[list[str] | None, typer.Option(help="Texts to measure on, in place of the paper's.")] = None,
        data: Annotated[list[str] | None, typer.Option(help="NAME=FILE of a test set (repeatable).")] = None,
        window: Annotated[int, typer.Option(help="Tokens of an evaluation window.")] = 2048,
        max_windows: Annotated[int | None, typer.Option(help="Windows of each text.")] = None,
        limit: Annotated[int | None, typer.Option(help="Questions of each zero-shot task.")] = None,
        set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of BESA's recipes.")] = None,
        device: str = "auto",
        dtype: str = "auto",
        batch: Annotated[int | None, typer.Option(help="Sequences in a forward pass.")] = None,
        work: Annotated[Path, typer.Option(help="Folder of runs, shared by all experiments.")] = Path("work"),
        keep: Annotated[bool, typer.Option("--keep", help="Keep pruned weights for other experiments.")] = False,
        results: Annotated[Path, typer.Option(help="Folder for results.")] = RESULTS,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run, and run nothing.")] = False,
    ) -> None:
        if points and not experiment.points:
            raise BesaError(f"{experiment.name} varies nothing that --points could be.")
        texts = tuple(ppl or experiment.texts) if experiment.texts else ()
        files = {name: file for name, _, file in (pair.partition("=") for pair in data or ())}
        options = Options(
            Conditions(model, calibration, samples, seqlen, str(named_device(device)), dtype, batch),
            Measures(
                texts, {n: f for n, f in files.items() if n in texts}, window, max_windows, experiment.tasks, limit
            ),
            sparsity,
            seeds,
            tuple(float(point) for point in points.split(",")) if points else experiment.points,
            tuple(set_ or ()),
        )
        if dry_run:
            print(json.dumps(planned(experiment, options), indent=2))
            return
        with show_progress() as tracker:
            workspace = Workspace(work, options.conditions, options.measures, keep, tracker)
            done = carry_out(experiment, options, workspace)
        write(experiment, done, results / experiment.name, sys.argv[1:])

    try:
        typer.run(command)
    except BesaError as error:
        print(f"besa: {error}", file=sys.stderr)
        sys.exit(2)


def carry_out(experiment: Experiment, options: Options, workspace: Workspace) -> Found:
    """Ask the workspace for every case."""
    data, notes = without_calibration(options, workspace.folder)
    workspace = replace(workspace, measures=replace(workspace.measures, data=data))
    outcomes: dict[str, list[Outcome]] = {}
    for case in experiment.cases(options):
        own = replace(workspace.conditions, samples=case.samples or options.conditions.samples)
        seeds = range(options.seeds if case.recipe else 1)
        outcomes[case.label] = [replace(workspace, conditions=own).outcome(case.recipe, seed) for seed in seeds]
    rows = {label: row(label, found, experiment.scores) for label, found in outcomes.items()}
    return Found(options, rows, outcomes, tuple(notes))


def planned(experiment: Experiment, options: Options) -> dict[str, Any]:
    """What would be run, every setting spelled out; of the model, its configuration is enough."""
    linears = sum(len(own) for own in linear_names(options.conditions.model).values())
    cases = [
        {
            "label": case.label,
            "samples": case.samples or options.conditions.samples,
            "recipe": case.recipe.model_dump(mode="json") if case.recipe else None,
        }
        for case in experiment.cases(options)
    ]
    return {"name": experiment.name, **asdict(options), "linears": linears, "cases": cases}
