"""Commands that measure and show: eval, inspect, verify, simulate, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from besa.cli.consoles import STDOUT, give, out
from besa.cli.options import (
    Bos,
    DataOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    EvaluationOption,
    HubOption,
    JsonOption,
    JsonProgressOption,
    LimitOption,
    MeasuredBatchOption,
    Model,
    QuietOption,
    TasksOption,
    TrustOption,
    WindowBosOption,
    counts,
    files_of,
    names,
    numbers,
    to_write,
)

commands = typer.Typer()
PANEL = "Measure"


@commands.command("eval", rich_help_panel=PANEL)
def evaluate_command(
    model: Model,
    ppl: EvaluationOption = None,
    data: DataOption = None,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Tokens of a window, or several lengths separated by commas; only results of equal length compare. "
            "Default: 2048, or as many as the model has positions.",
        ),
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option(min=1, help="Use only this number of windows of each text.")
    ] = None,
    tasks: TasksOption = None,
    limit: LimitOption = None,
    hub: HubOption = False,
    bos: WindowBosOption = Bos.auto,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
    batch: MeasuredBatchOption = None,
    json: JsonOption = None,
    quiet: QuietOption = False,
    json_progress: JsonProgressOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure a model's perplexity on texts, and its accuracy on zero-shot tasks."""
    from besa.api import evaluate
    from besa.cli.show.measuring import evaluated
    from besa.cli.tracking import show_progress
    from besa.evaluation.adding import added
    from besa.evaluation.carding import tell_card
    from besa.evaluation.result import EVALUATION_NAME
    from besa.system import ranks

    with show_progress(quiet=quiet, json_progress=json_progress) as tracker:
        result = evaluate(
            model,
            names(ppl),
            data=files_of(data),
            window=None if window is None else numbers("--window", window, int),
            max_windows=max_windows,
            tasks=names(tasks),
            limit=limit,
            hub=hub,
            bos=bos.value,
            batch=batch,
            device=device,
            dtype=dtype.value,
            trust_remote_code=trust_remote_code,
            progress=tracker,
        )
    if json in (None, STDOUT) or not ranks.is_first():
        give(result, evaluated(result), json)
        return
    give(added(result, json) if json.name == EVALUATION_NAME else result, evaluated(result), json)
    tell_card(json, model)


@commands.command("inspect", rich_help_panel=PANEL)
def inspect_command(
    model: Model,
    json: JsonOption = None,
    quiet: QuietOption = False,
    json_progress: JsonProgressOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Count the sparsity and size of each block and linear in the files."""
    from besa.checkpoint.inspection import inspect
    from besa.cli.show.measuring import contents
    from besa.cli.tracking import show_progress
    from besa.models.source import locate

    with show_progress(quiet=quiet, json_progress=json_progress) as tracker:
        result = inspect(locate(model, tracker, trust_remote_code=trust_remote_code), tracker)
    give(result, contents(result), json)


@commands.command("verify", rich_help_panel=PANEL)
def verify_command(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A folder that prune, pack, unpack or shrink wrote.")
    ],
    json: JsonOption = None,
    quiet: QuietOption = False,
    json_progress: JsonProgressOption = None,
) -> None:
    """Compare a checkpoint with the digests of its files; the contents of a packed one are checked too."""
    from besa.checkpoint.verification import verify
    from besa.cli.show.measuring import verified
    from besa.cli.tracking import show_progress

    with show_progress(quiet=quiet, json_progress=json_progress) as tracker:
        result = verify(folder, progress=tracker)
    give(result, verified(result, folder), json)


@commands.command("simulate", rich_help_panel=PANEL)
def simulate_command(
    model: Model,
    tokens: Annotated[
        str, typer.Option(metavar="T,T,…", help="Numbers of input vectors for the figures that include memory.")
    ] = "1,8,32,128,512",
    method_baseline: Annotated[
        list[str] | None, typer.Option(metavar="DIR", help="Another checkpoint of the model, to compare (repeatable).")
    ] = None,
    json: JsonOption = None,
    quiet: QuietOption = False,
    json_progress: JsonProgressOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Count the cycles that ViTCoD, an accelerator for sparse weights, would take (the paper's Table 4)."""
    from besa.api import simulate
    from besa.cli.show.measuring import simulated
    from besa.cli.tracking import show_progress
    from besa.simulator import check_alike

    vectors = counts("--tokens", tokens)
    with show_progress(quiet=quiet, json_progress=json_progress) as tracker:
        results = [
            simulate(name, vectors, trust_remote_code=trust_remote_code, progress=tracker)
            for name in [model, *(method_baseline or ())]
        ]
    check_alike(results)
    result = results[0].model_copy(update={"baselines": results[1:]})
    give(result, simulated(result), json)


@commands.command(rich_help_panel=PANEL)
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders that `besa prune` wrote, or with a besa_eval.json.")
    ],
    page: Annotated[Path, typer.Option("--out", metavar="FILE", callback=to_write, help="The page to write.")] = Path(
        "report.html"
    ),
) -> None:
    """Put runs side by side on one self-contained HTML page."""
    from besa.report import load_runs, render
    from besa.storage.writing import write_file

    write_file(page, render(load_runs(runs)))
    out.print(f"Report: {page}")
