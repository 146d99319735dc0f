"""Commands that measure and show: eval, inspect, verify, simulate, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from besa.cli.consoles import err, keep, out
from besa.cli.options import (
    BatchOption,
    Bos,
    BosOption,
    DataOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    EvaluationOption,
    HubOption,
    JsonOption,
    LimitOption,
    Model,
    TasksOption,
    TrustOption,
    files_of,
    numbers,
    to_write,
    words,
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
    tasks: TasksOption = "",
    limit: LimitOption = None,
    hub: HubOption = False,
    bos: BosOption = Bos.auto,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
    batch: BatchOption = None,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure a model's perplexity on texts, and its accuracy on zero-shot tasks."""
    from besa.api import evaluate
    from besa.cli.show import evaluated, progress_bar
    from besa.evaluation.carding import tell_card
    from besa.system import ranks

    with progress_bar(err) as tracker:
        result = evaluate(
            model,
            ppl or (),
            data=files_of(data),
            window=None if window is None else numbers("--window", window, int),
            max_windows=max_windows,
            tasks=words(tasks),
            limit=limit,
            hub=hub,
            bos=bos.value,
            batch=batch,
            device=device,
            dtype=dtype.value,
            trust_remote_code=trust_remote_code,
            progress=tracker,
        )
    if ranks.is_first():
        keep(result, json)
        if json is not None:
            tell_card(json, model)
    out.print(evaluated(result))


@commands.command("inspect", rich_help_panel=PANEL)
def inspect_command(model: Model, json: JsonOption = None, trust_remote_code: TrustOption = False) -> None:
    """Count the sparsity and size of each block and linear in the files."""
    from besa.checkpoint.inspection import inspect
    from besa.cli.show import contents, progress_bar
    from besa.models.loading import locate

    with progress_bar(err) as tracker:
        result = inspect(locate(model, tracker, trust_remote_code=trust_remote_code), tracker)
    keep(result, json)
    out.print(contents(result))


@commands.command("verify", rich_help_panel=PANEL)
def verify_command(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A folder that prune, pack, unpack or shrink wrote.")
    ],
) -> None:
    """Compare a checkpoint with the digests of its files; the contents of a packed one are checked too."""
    from besa.checkpoint.verification import verify
    from besa.cli.show import progress_bar, verified

    with progress_bar(err) as tracker:
        result = verify(folder, progress=tracker)
    out.print(verified(result, folder))


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
    trust_remote_code: TrustOption = False,
) -> None:
    """Count the cycles that ViTCoD, an accelerator for sparse weights, would take (the paper's Table 4)."""
    from besa.api import simulate
    from besa.cli.show import progress_bar, simulated
    from besa.simulator import check_alike

    with progress_bar(err) as tracker:
        results = [
            simulate(name, numbers("--tokens", tokens, int), trust_remote_code=trust_remote_code, progress=tracker)
            for name in [model, *(method_baseline or ())]
        ]
    check_alike(results)
    keep(results[0], json)
    out.print(simulated(results[0], results[1:]))


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
    from besa.report import load_run, render
    from besa.storage.writing import write_file

    write_file(page, render([load_run(run) for run in runs]))
    out.print(f"Report: {page}")
