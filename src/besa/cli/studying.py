"""Commands that prune by several recipes and compare what comes out: compare, demo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from besa.cli import completing
from besa.cli.consoles import STDOUT, give, out
from besa.cli.options import (
    CALIBRATION,
    SAMPLES,
    BatchOption,
    Bos,
    BothBosOption,
    CalibrationOption,
    ChatOption,
    DataOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    EvaluationOption,
    HubOption,
    JsonOption,
    JsonProgressOption,
    LimitOption,
    Model,
    QuietOption,
    SamplesOption,
    SeqlenOption,
    TasksOption,
    TrustOption,
    check_result,
    files_of,
    names,
    numbers,
    words,
)

commands = typer.Typer()
PANEL = "Prune"


@commands.command("compare", rich_help_panel=PANEL)
def compare_command(
    model: Model,
    recipes: Annotated[
        str,
        typer.Option(
            metavar="NAMES", autocompletion=completing.recipes, help="Recipes, shipped or YAML files, by commas."
        ),
    ],
    sparsity: Annotated[
        str | None,
        typer.Option(metavar="SHARES", help="Shares of the prunable weights, by commas; default: each recipe's own."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs of each, with the seeds 0, 1, …")] = 1,
    out_dir: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder for runs, table and plot; what it has is used again, and its table gets more rows.",
        ),
    ] = Path("compare"),
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the pruned checkpoints; by default only their records are kept.")
    ] = False,
    ppl: EvaluationOption = None,
    data: DataOption = None,
    window: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a window; default: 2048, or as many as the model has positions."),
    ] = None,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Use only so many windows of each text.")] = None,
    tasks: TasksOption = None,
    limit: LimitOption = None,
    hub: HubOption = False,
    calibration: CalibrationOption = CALIBRATION,
    samples: SamplesOption = SAMPLES,
    seqlen: SeqlenOption = None,
    bos: BothBosOption = Bos.auto,
    chat: ChatOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
    batch: BatchOption = None,
    json: JsonOption = None,
    quiet: QuietOption = False,
    json_progress: JsonProgressOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Prune by several recipes, at several sparsities and seeds, and put what comes out into one table and one plot."""
    from besa.cli.show.studying import compared
    from besa.cli.tracking import show_progress
    from besa.data.arguments import check_used
    from besa.evaluation.texts import spelled_out
    from besa.models.limits import usual_length
    from besa.models.source import locate
    from besa.studies.comparing import compare
    from besa.studies.workspace import Conditions, Measures, Workspace
    from besa.system import memory, ranks
    from besa.system.devices import resolve_device

    check_result(out_dir, json)
    asked = tuple(names(tasks))
    texts = tuple(spelled_out(names(ppl) or ([] if asked else ["encyclopedia"])))
    check_used("--tasks", asked, {"--limit": limit, "--hub": hub})
    check_used("--ppl", texts, {"--window": window, "--max-windows": max_windows})
    source = locate(model, trust_remote_code=trust_remote_code).local(weights=False)
    usual = usual_length(source) if seqlen is None or window is None else 0
    measures = Measures(texts, files_of(data), usual if window is None else window, max_windows, asked, limit, hub)
    own_device = str(resolve_device(device))
    conditions = Conditions(
        model,
        calibration,
        samples,
        usual if seqlen is None else seqlen,
        ranks.from_first(own_device),
        dtype.value,
        batch,
        bos.value,
        trust_remote_code,
        chat,
    )
    memory.stay_lean()
    with show_progress(quiet=quiet, json_progress=json_progress) as tracker:
        workspace = Workspace(out_dir, conditions, measures, keep, tracker, own_device)
        command = ["besa", *sys.argv[1:]]
        sparsities = None if sparsity is None else numbers("--sparsity", sparsity, float)
        result = compare(workspace, words(recipes), sparsities, seeds, command)
    give(result, compared(result, out_dir), json)


@commands.command(rich_help_panel=PANEL)
def demo(
    out_dir: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="Folder for checkpoints, table and report; what it has is used again."
        ),
    ] = Path("demo"),
    full: Annotated[
        bool, typer.Option("--full", help="All methods, 64 × 512 tokens of calibration: about half an hour on 2 cores.")
    ] = False,
    sparsity: Annotated[float, typer.Option(help="Share of the prunable weights to set to zero.")] = 0.5,
    ppl: EvaluationOption = None,
    calibration: CalibrationOption = "c4",
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = None,
    quiet: QuietOption = False,
    json_progress: JsonProgressOption = None,
) -> None:
    """Prune the embedded SmolLM2-135M with Wanda and BESA (--full: five methods), and compare what is left."""
    from besa.cli.show.studying import demonstrated
    from besa.cli.tracking import show_progress
    from besa.studies.demo import FULL, QUICK, check_demo, run_demo
    from besa.system import memory

    check_result(out_dir, json)
    plan, texts = FULL if full else QUICK, names(ppl) or ["wiki"]
    check_demo(out_dir, plan, sparsity, texts, calibration)
    if json != STDOUT:
        out.print(Text.assemble(("besa demo", "bold"), f": {plan.summary(sparsity)}"))
    memory.stay_lean()
    with show_progress(quiet=quiet, json_progress=json_progress) as tracker:
        command = ["besa", *sys.argv[1:]]
        result = run_demo(out_dir, plan, sparsity, texts, calibration, device, dtype.value, command, tracker)
    give(result.comparison, demonstrated(result), json)
