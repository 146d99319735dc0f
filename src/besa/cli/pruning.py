"""Commands that prune: demo, prune, shrink, plan, recipes, compare."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from besa.cli import completing
from besa.cli.consoles import STDOUT, give, out
from besa.cli.options import (
    BatchOption,
    Bos,
    BosOption,
    BudgetOption,
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
    TasksOption,
    TrustOption,
    bytes_of,
    files_of,
    names,
    numbers,
    words,
)

if TYPE_CHECKING:
    from besa.methods.recipe import Recipe

commands = typer.Typer()
PANEL = "Prune"
SAMPLES = 128  # calibration sequences, as in the paper
CALIBRATION = "mix"  # of the embedded texts: the best of three by the mean of the domains (docs/log.md)


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
    """Prune the embedded SmolLM2-135M by BESA and by the methods it must beat, and show what is left of it."""
    from besa.cli.show import demonstrated
    from besa.cli.tracking import show_progress
    from besa.studies.demo import FULL, QUICK, run_demo
    from besa.system import memory

    plan = FULL if full else QUICK
    if json != STDOUT:
        out.print(f"[bold]besa demo[/]: {plan.summary(sparsity)}")
    memory.stay_lean()
    with show_progress(quiet=quiet, json_progress=json_progress) as tracker:
        command = ["besa", *sys.argv[1:]]
        result = run_demo(
            out_dir, plan, sparsity, names(ppl) or ["wiki"], calibration, device, dtype.value, command, tracker
        )
    give(result.comparison, demonstrated(result), json)


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
    seed: Annotated[int, typer.Option(help="Of the calibration sample and the learning order.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
    batch: BatchOption = None,
    set_: SetOption = None,
    skip: SkipOption = None,
    sparsity_of: SparsityOfOption = None,
    activation_budget: BudgetOption = None,
    dequantized: Annotated[
        bool, typer.Option("--dequantized", help="Write quantised weights as dense numbers, not as codes.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print the recipe as it would run, with what each stage does, and stop.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run towards OUT.")] = False,
    json: JsonOption = None,
    quiet: QuietOption = False,
    json_progress: JsonProgressOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Prune a model block by block and write a checkpoint that transformers loads, with a run record."""
    from besa.api import compress
    from besa.cli.show import pruned
    from besa.cli.tracking import show_progress
    from besa.errors import BesaError
    from besa.planning import within
    from besa.system import memory

    if passes is not None and minutes is not None:
        raise BesaError("A run has either passes or minutes to spend: give --passes or --minutes, not both.")
    chosen = _recipe(recipe, sparsity, set_, skip, sparsity_of, passes, samples, seqlen, model, trust_remote_code)
    if minutes is not None:
        chosen = within(chosen, minutes)
    if explain:
        _explain(chosen, model, samples, seqlen, trust_remote_code, json)
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
    give(result.record, pruned(result.record, out_dir), json)


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
    """Write a pruned model without unread feed-forward channels and heads, and without blocks that do nothing."""
    from besa.checkpoint.shrinking import shrink as shrink_checkpoint
    from besa.cli.show import shrunk
    from besa.cli.tracking import show_progress

    with show_progress(quiet=quiet, json_progress=json_progress) as tracker:
        result = shrink_checkpoint(
            model, out_dir, by_block=by_block, trust_remote_code=trust_remote_code, progress=tracker
        )
    give(result, shrunk(result, out_dir), json)


@commands.command("plan", rich_help_panel=PANEL)
def plan_command(
    model: Model,
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the checkpoint would go.")] = Path(),
    recipe: RecipeOption = "besa",
    sparsity: SparsityOption = None,
    passes: PassesOption = None,
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
    ranks: Annotated[
        int, typer.Option(min=1, max=1024, help="Processes that torchrun would start here, one for each device.")
    ] = 1,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Estimate from a model's configuration what pruning it will take, and whether it fits on this machine."""
    from besa.api import plan
    from besa.cli.show import planned

    result = plan(
        model,
        _recipe(recipe, sparsity, set_, skip, sparsity_of, passes, samples, seqlen, model, trust_remote_code),
        out=out_dir,
        calibration=calibration,
        samples=samples,
        seqlen=seqlen,
        device=device,
        dtype=dtype.value,
        batch=batch,
        activation_budget=bytes_of(activation_budget),
        ranks=ranks,
        trust_remote_code=trust_remote_code,
    )
    give(result, planned(result), json)


@commands.command(rich_help_panel=PANEL)
def recipes(json: JsonOption = None) -> None:
    """List the recipes that come with besa: what each is for, what it needs, and what it costs."""
    from besa.cli.show import recipes_listed
    from besa.models.limits import USUAL
    from besa.planning import list_recipes

    result = list_recipes(SAMPLES, USUAL)
    give(result, recipes_listed(result), json)


@commands.command("compare", rich_help_panel=PANEL)
def compare_command(
    model: Model,
    recipes: Annotated[
        str,
        typer.Option(
            metavar="NAMES", autocompletion=completing.recipes, help="Recipes, shipped or YAML files, by commas."
        ),
    ],
    sparsity: Annotated[str, typer.Option(metavar="SHARES", help="Shares of the prunable weights, by commas.")] = "0.5",
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Runs of each, with the seeds 0, 1, …")] = 1,
    out_dir: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder for runs, table and plot; what it has is used again, and its table gets more rows.",
        ),
    ] = Path("compare"),
    keep: Annotated[bool, typer.Option("--keep", help="Keep the pruned checkpoints, not their records only.")] = False,
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
    bos: BosOption = Bos.auto,
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
    from besa.cli.show import compared
    from besa.cli.tracking import show_progress
    from besa.evaluation.texts import spelled_out
    from besa.models.limits import usual_length
    from besa.models.loading import locate
    from besa.studies.comparing import compare
    from besa.studies.workspace import Conditions, Measures, Workspace
    from besa.system import memory, ranks
    from besa.system.devices import resolve_device

    texts = tuple(spelled_out(names(ppl) or ([] if tasks else ["encyclopedia"])))
    source = locate(model, trust_remote_code=trust_remote_code).local(weights=False)
    usual = usual_length(source) if seqlen is None or window is None else 0
    measures = Measures(
        texts, files_of(data), usual if window is None else window, max_windows, tuple(names(tasks)), limit, hub
    )
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
        result = compare(workspace, words(recipes), numbers("--sparsity", sparsity, float), seeds, command)
    give(result, compared(result, out_dir), json)


def _recipe(
    name: str,
    sparsity: float | None,
    settings: list[str] | None,
    skip: list[str] | None,
    sparsity_of: list[str] | None,
    passes: float | None,
    samples: int,
    seqlen: int | None,
    model: str,
    trust_remote_code: bool,
) -> Recipe:
    """The recipe that the options describe.

    Raises:
        BesaError: no such recipe, a setting that it cannot have, or a model that cannot be read.
    """
    from besa.methods.recipe import Recipe
    from besa.planning import spending

    recipe = Recipe.load(name, sparsity, settings or ()).with_exceptions(skip or (), sparsity_of or ())
    if passes is None:
        return recipe
    about = _about(model, trust_remote_code)
    return spending(recipe, passes, samples, about.seqlen if seqlen is None else seqlen, about.head)


def _explain(
    recipe: Recipe, model: str, samples: int, seqlen: int | None, trust_remote_code: bool, json: Path | None
) -> None:
    """Print what the stages of a recipe do to a model.

    Raises:
        BesaError: the model cannot be read.
    """
    from besa.planning import explain
    from besa.system import ranks

    about = _about(model, trust_remote_code)
    length = about.seqlen if seqlen is None else seqlen
    explanation = explain(recipe, samples, length, ranks.count(), about.routed, about.head)
    give(explanation, Text(explanation.text.rstrip()), json)


@dataclass(frozen=True)
class _About:
    """What the cost of a recipe depends on, of a model: its usual length, and as of `forward_passes`."""

    seqlen: int
    routed: bool
    head: float


def _about(model: str, trust_remote_code: bool) -> _About:
    """From the configuration alone.

    Raises:
        BesaError: it cannot be read.
    """
    from besa.models.blocks import find_blocks
    from besa.models.limits import positions
    from besa.models.loading import locate, read_config, skeleton
    from besa.models.whole import head_share

    source = locate(model, trust_remote_code=trust_remote_code).local(weights=False)
    empty = skeleton(source, read_config(source))
    blocks = find_blocks(empty)
    routed = any(prunable.routed for block in blocks for prunable in block.prunables.values())
    return _About(positions(empty).usual, routed, head_share(empty, blocks))
