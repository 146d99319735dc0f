"""Commands about one pruned model: prune, shrink, plan, recipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from besa.cli import interrupting
from besa.cli.choosing import RecipeOptions, check_no_run
from besa.cli.consoles import give
from besa.cli.options import (
    CALIBRATION,
    SAMPLES,
    BatchOption,
    Bos,
    BosOption,
    BudgetOption,
    CalibrationOption,
    ChatOption,
    DequantizedOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    JsonProgressOption,
    MinutesOption,
    Model,
    PassesOption,
    QuietOption,
    RecipeOption,
    SamplesOption,
    SeqlenOption,
    SetOption,
    SkipOption,
    SparsityOfOption,
    SparsityOption,
    TrustOption,
    bytes_of,
    check_files,
)

commands = typer.Typer()
PANEL = "Prune"


@commands.command(rich_help_panel=PANEL)
def prune(
    model: Model,
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the pruned checkpoint; must not exist.")],
    recipe: RecipeOption = "besa",
    sparsity: SparsityOption = None,
    passes: PassesOption = None,
    minutes: MinutesOption = None,
    calibration: CalibrationOption = CALIBRATION,
    samples: SamplesOption = SAMPLES,
    seqlen: SeqlenOption = None,
    bos: BosOption = Bos.auto,
    chat: ChatOption = False,
    seed: Annotated[int, typer.Option(help="Seed of the calibration sample and of the order of learning steps.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
    batch: BatchOption = None,
    set_: SetOption = None,
    skip: SkipOption = None,
    sparsity_of: SparsityOfOption = None,
    activation_budget: BudgetOption = None,
    dequantized: DequantizedOption = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Print the recipe as it would run, with what each stage does, and stop. Of the other options, "
            "those of the recipe, --samples and --seqlen count.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume an interrupted run that writes to OUT, or begin it.")
    ] = False,
    json: JsonOption = None,
    quiet: QuietOption = False,
    json_progress: JsonProgressOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Prune a model block by block and write a checkpoint that transformers loads, with a run record."""
    interrupting.writes(out_dir)
    from besa.api import compress
    from besa.api.choosing import check_coded
    from besa.cli.show.pruning import pruned
    from besa.cli.tracking import show_progress
    from besa.record import RunRecord
    from besa.system import memory

    check_files(out_dir, json, json_progress)
    if explain:
        check_no_run({"--resume": resume, "--json-progress": json_progress})
    options = RecipeOptions(
        recipe, sparsity, set_, skip, sparsity_of, passes, minutes, samples, seqlen, model, trust_remote_code
    )
    chosen = options.chosen()
    if explain:
        check_coded(dequantized, chosen)
        explanation = options.explained(chosen)
        give(explanation, Text(explanation.text.rstrip()), json)
        return
    memory.stay_lean()
    with show_progress(quiet=quiet, json_progress=json_progress) as tracker:
        result = compress(
            model,
            chosen,
            calibration,
            out=out_dir,
            samples=samples,
            seqlen=seqlen,
            bos=bos.value,
            chat=chat,
            seed=seed,
            device=device,
            dtype=dtype.value,
            batch=batch,
            activation_budget=bytes_of(activation_budget),
            resume=resume,
            dequantized=dequantized,
            trust_remote_code=trust_remote_code,
            command=["besa", *sys.argv[1:]],
            progress=tracker,
        )
    record = RunRecord.of(out_dir) or result.record  # with the digests of the files
    give(record, pruned(record, out_dir), json)


@commands.command(rich_help_panel=PANEL)
def shrink(
    model: Annotated[
        str,
        typer.Argument(
            metavar="PRUNED",
            help="A model with whole channels or blocks pruned, as by allocation.method=structured or depth.",
        ),
    ],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the smaller model; must not exist.")],
    by_block: Annotated[
        bool,
        typer.Option("--by-block", help="Each block keeps its own width; loading the folder then needs besa."),
    ] = False,
    json: JsonOption = None,
    quiet: QuietOption = False,
    json_progress: JsonProgressOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Remove channels and heads that are zero, and blocks that do nothing, so that matrices are smaller."""
    from besa.checkpoint.shrinking import shrink as shrink_checkpoint
    from besa.cli.show.pruning import shrunk
    from besa.cli.tracking import show_progress

    check_files(out_dir, json, json_progress)
    with show_progress(quiet=quiet, json_progress=json_progress) as tracker:
        result = shrink_checkpoint(
            model, out_dir, by_block=by_block, trust_remote_code=trust_remote_code, progress=tracker
        )
    give(result, shrunk(result, out_dir), json)


@commands.command("plan", rich_help_panel=PANEL)
def plan_command(
    model: Model,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where the checkpoint would go; default: in the working folder."),
    ] = None,
    recipe: RecipeOption = "besa",
    sparsity: SparsityOption = None,
    passes: PassesOption = None,
    minutes: MinutesOption = None,
    calibration: CalibrationOption = CALIBRATION,
    samples: SamplesOption = SAMPLES,
    seqlen: SeqlenOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
    batch: BatchOption = None,
    set_: SetOption = None,
    skip: SkipOption = None,
    sparsity_of: SparsityOfOption = None,
    activation_budget: BudgetOption = None,
    dequantized: DequantizedOption = False,
    ranks: Annotated[
        int, typer.Option(min=1, max=1024, help="Processes that torchrun would start here, one for each device.")
    ] = 1,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Estimate from a model's configuration what pruning it will take, and whether it fits on this machine."""
    from besa.api import plan
    from besa.cli.show.pruning import planned

    options = RecipeOptions(
        recipe, sparsity, set_, skip, sparsity_of, passes, minutes, samples, seqlen, model, trust_remote_code
    )
    chosen = options.chosen()
    result = plan(
        model,
        chosen,
        out=out_dir,
        calibration=calibration,
        samples=samples,
        seqlen=seqlen,
        device=device,
        dtype=dtype.value,
        batch=batch,
        activation_budget=bytes_of(activation_budget),
        dequantized=dequantized,
        ranks=ranks,
        trust_remote_code=trust_remote_code,
    )
    give(result, planned(result), json)


@commands.command(rich_help_panel=PANEL)
def recipes(json: JsonOption = None) -> None:
    """List the recipes that come with besa: what each is for, what it needs, and what it costs."""
    from besa.cli.show.pruning import recipes_listed
    from besa.models.limits import USUAL
    from besa.planning import list_recipes

    result = list_recipes(SAMPLES, USUAL)
    give(result, recipes_listed(result), json)
