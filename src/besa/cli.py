"""The command line: parse, call the API, show. The only part of besa that prints."""

from __future__ import annotations

import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from besa.errors import BesaError, Interrupted, Notice

app = typer.Typer(
    help="Prune large language models block by block, with learned and exact sparsity, and measure the result.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
Number = TypeVar("Number", int, float)
UsageError: Any = typer.BadParameter.__base__  # of all complaints about arguments; typer exports only this child
out = Console()
err = Console(stderr=True)


class Device(StrEnum):
    """Where blocks are computed."""

    cpu = "cpu"
    cuda = "cuda"


class Dtype(StrEnum):
    """Floating-point format of weights and computation; auto is the checkpoint's."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hugging Face id, folder, .gguf file, or smollm2 (embedded).")
]
TEXTS = "c4, wiki, a .txt, .jsonl or .parquet file, or hf:<dataset>"
CalibrationOption = Annotated[str, typer.Option(metavar="TEXT", help=f"Text to calibrate on: {TEXTS}.")]
EvaluationOption = Annotated[
    list[str] | None,
    typer.Option(
        "--ppl",
        metavar="TEXT",
        help="Measure perplexity (repeatable) on wikitext2, ptb or c4, the papers' test sets, or on another text: wiki "
        "(embedded), a .txt, .jsonl or .parquet file, or hf:<dataset>.",
    ),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data", metavar="NAME=FILE", help="Local file of a test set, which else is downloaded (repeatable)."
    ),
]
TasksOption = Annotated[
    str,
    typer.Option(
        metavar="NAMES",
        help="Zero-shot tasks, of piqa,boolq,hellaswag,winogrande,arc_easy,arc_challenge, by commas.",
    ),
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Ask only so many questions of each task.")]
HubOption = Annotated[
    bool, typer.Option("--hub", help="Take the questions from the Hugging Face Hub, not the embedded ones.")
]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Weights and computation; auto: the checkpoint's.")]
BatchOption = Annotated[
    int | None, typer.Option(min=1, help="Sequences in a forward pass; default: about 2048 tokens, on a GPU 8192.")
]
RecipeOption = Annotated[
    str,
    typer.Option(help="besa, fast, best, besa-layerwise, besa-int4, wanda, sparsegpt, magnitude, … or a YAML file."),
]
SparsityOption = Annotated[
    float | None, typer.Option(help="Share of the prunable weights to set to zero; default: the recipe's.")
]
SamplesOption = Annotated[int, typer.Option(min=1, help="Calibration sequences.")]
SeqlenOption = Annotated[int, typer.Option(min=2, help="Tokens of a calibration sequence.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one setting of the recipe, such as allocation.steps=64 (repeatable).",
    ),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
]
SkipOption = Annotated[
    list[str] | None,
    typer.Option("--skip", metavar="PATTERN", help="Leave linears dense, such as '*.k_proj' (repeatable)."),
]
SparsityOfOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sparsity-of",
        metavar="PATTERN=S",
        help="Give each linear that matches a sparsity of its own, such as '*.0.*=0.3' (repeatable).",
    ),
]
BudgetOption = Annotated[
    float | None,
    typer.Option(
        "--activation-budget", min=0, help="GB of activations in memory, more on disk; default: half of what is free."
    ),
]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result here as JSON too.")]


@app.command()
def demo(
    out_dir: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for checkpoints and report; must not exist.")
    ] = Path("demo"),
    full: Annotated[
        bool, typer.Option("--full", help="All methods, 64 × 512 tokens of calibration: about half an hour on 2 cores.")
    ] = False,
    sparsity: Annotated[float, typer.Option(help="Share of the prunable weights to set to zero.")] = 0.5,
    ppl: EvaluationOption = None,
    calibration: CalibrationOption = "c4",
    device: DeviceOption = Device.cpu,
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Prune the embedded SmolLM2-135M by BESA and by the methods it must beat, and show what is left of it."""
    from besa.demo import FULL, QUICK, run_demo
    from besa.show import comparison, progress_bar

    plan = FULL if full else QUICK
    out.print(f"[bold]besa demo[/]: {plan.summary(sparsity)}")
    with progress_bar(err) as tracker:
        page, rows = run_demo(out_dir, plan, sparsity, ppl or ["wiki"], calibration, device.value, dtype.value, tracker)
    out.print(comparison(rows))
    out.print(f"Report: {page}")


@app.command()
def prune(
    model: Model,
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the pruned checkpoint; must not exist.")],
    recipe: RecipeOption = "besa",
    sparsity: SparsityOption = None,
    calibration: CalibrationOption = "c4",
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = 2048,
    seed: Annotated[int, typer.Option(help="Of the calibration sample and the learning order.")] = 0,
    device: DeviceOption = Device.cpu,
    dtype: DtypeOption = Dtype.auto,
    batch: BatchOption = None,
    set_: SetOption = None,
    skip: SkipOption = None,
    sparsity_of: SparsityOfOption = None,
    activation_budget: BudgetOption = None,
    dequantized: Annotated[
        bool, typer.Option("--dequantized", help="Write quantised weights as dense numbers, not as packed codes.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run towards OUT.")] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Prune a model block by block and write a checkpoint that transformers loads, with a run record."""
    from besa.api import compress
    from besa.recipe import Recipe
    from besa.show import progress_bar, pruned

    with progress_bar(err) as tracker:
        result = compress(
            model,
            Recipe.load(recipe, sparsity, set_ or ()).with_exceptions(skip or (), sparsity_of or ()),
            calibration,
            out=out_dir,
            samples=samples,
            seqlen=seqlen,
            seed=seed,
            device=device.value,
            dtype=dtype.value,
            batch=batch,
            activation_budget=None if activation_budget is None else round(activation_budget * 1e9),
            resume=resume,
            dequantized=dequantized,
            trust_remote_code=trust_remote_code,
            command=["besa", *sys.argv[1:]],
            progress=tracker,
        )
    out.print(pruned(result.record, out_dir))


@app.command("plan")
def plan_command(
    model: Model,
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the checkpoint would go.")] = Path(),
    recipe: RecipeOption = "besa",
    sparsity: SparsityOption = None,
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = 2048,
    device: DeviceOption = Device.cpu,
    dtype: DtypeOption = Dtype.auto,
    batch: BatchOption = None,
    set_: SetOption = None,
    skip: SkipOption = None,
    sparsity_of: SparsityOfOption = None,
    activation_budget: BudgetOption = None,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Say what pruning a model will take, from its configuration alone, and whether it fits here."""
    from besa.api import plan
    from besa.checkpoint.files import write_file
    from besa.recipe import Recipe
    from besa.show import planned

    found = plan(
        model,
        Recipe.load(recipe, sparsity, set_ or ()).with_exceptions(skip or (), sparsity_of or ()),
        out=out_dir,
        samples=samples,
        seqlen=seqlen,
        device=device.value,
        dtype=dtype.value,
        batch=batch,
        activation_budget=None if activation_budget is None else round(activation_budget * 1e9),
        trust_remote_code=trust_remote_code,
    )
    if json is not None:
        write_file(json, found.model_dump_json(indent=2) + "\n")
    out.print(planned(found))


@app.command("eval")
def evaluate_command(
    model: Model,
    ppl: EvaluationOption = None,
    data: DataOption = None,
    window: Annotated[
        str,
        typer.Option(metavar="TOKENS", help="Tokens of a window, or several lengths by commas; only equal compare."),
    ] = "2048",
    max_windows: Annotated[int | None, typer.Option(min=1, help="Use only so many windows of each text.")] = None,
    tasks: TasksOption = "",
    limit: LimitOption = None,
    hub: HubOption = False,
    device: DeviceOption = Device.cpu,
    dtype: DtypeOption = Dtype.auto,
    batch: BatchOption = None,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure a model's perplexity on texts, and its accuracy on zero-shot tasks."""
    from besa.api import evaluate
    from besa.checkpoint.files import write_file
    from besa.show import evaluated, progress_bar

    with progress_bar(err) as tracker:
        result = evaluate(
            model,
            ppl or (),
            data=_files(data),
            window=_numbers("--window", window, int),
            max_windows=max_windows,
            tasks=_words(tasks),
            limit=limit,
            hub=hub,
            batch=batch,
            device=device.value,
            dtype=dtype.value,
            trust_remote_code=trust_remote_code,
            progress=tracker,
        )
    if json is not None:
        write_file(json, result.model_dump_json(indent=2) + "\n")
    out.print(evaluated(result))


@app.command("compare")
def compare_command(
    model: Model,
    recipes: Annotated[str, typer.Option(metavar="NAMES", help="Recipes, shipped or YAML files, by commas.")],
    sparsity: Annotated[str, typer.Option(metavar="SHARES", help="Shares of the prunable weights, by commas.")] = "0.5",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with the seeds 0, 1, …")] = 1,
    out_dir: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for runs, table and plot; what it has is used again.")
    ] = Path("compare"),
    keep: Annotated[bool, typer.Option("--keep", help="Keep the pruned checkpoints, not their records only.")] = False,
    ppl: EvaluationOption = None,
    data: DataOption = None,
    window: Annotated[int, typer.Option(help="Tokens of a window; compare only equal windows.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Use only so many windows of each text.")] = None,
    tasks: TasksOption = "",
    limit: LimitOption = None,
    hub: HubOption = False,
    calibration: CalibrationOption = "c4",
    samples: SamplesOption = 128,
    seqlen: SeqlenOption = 2048,
    device: DeviceOption = Device.cpu,
    dtype: DtypeOption = Dtype.auto,
    batch: BatchOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Prune by several recipes, at several sparsities and seeds, and put what comes out into one table and one plot."""
    from besa.comparing import compare
    from besa.show import compared, progress_bar
    from besa.workspace import Conditions, Measures, Workspace

    texts = tuple(ppl or ([] if tasks else ["wiki"]))
    measures = Measures(texts, _files(data), window, max_windows, tuple(_words(tasks)), limit, hub)
    conditions = Conditions(
        model, calibration, samples, seqlen, device.value, dtype.value, batch, trust_remote_code=trust_remote_code
    )
    with progress_bar(err) as tracker:
        workspace = Workspace(out_dir, conditions, measures, keep, tracker)
        command = ["besa", *sys.argv[1:]]
        found = compare(workspace, _words(recipes), _numbers("--sparsity", sparsity, float), seeds, command)
    out.print(compared(found))
    out.print(f"Table and plot: {out_dir / 'compare.md'}, {out_dir / 'compare.svg'}")


@app.command("inspect")
def inspect_command(model: Model, json: JsonOption = None, trust_remote_code: TrustOption = False) -> None:
    """Count sparsity and size by block and linear, in the files."""
    from besa.checkpoint.files import write_file
    from besa.checkpoint.inspection import inspect
    from besa.models.loading import locate
    from besa.show import contents, progress_bar

    with progress_bar(err) as tracker:
        found = inspect(locate(model, tracker), trust_remote_code, tracker)
    if json is not None:
        write_file(json, found.model_dump_json(indent=2) + "\n")
    out.print(contents(found))


@app.command("simulate")
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
    from besa.checkpoint.files import write_file
    from besa.show import progress_bar, simulated
    from besa.simulator import check_alike

    if not all(number.strip().isdecimal() for number in tokens.split(",")):
        raise BesaError(f"--tokens takes whole numbers with commas between, such as 1,32,512, and not {tokens!r}.")
    counts = [int(number) for number in tokens.split(",")]
    with progress_bar(err) as tracker:
        found = [
            simulate(name, counts, trust_remote_code=trust_remote_code, progress=tracker)
            for name in [model, *(method_baseline or ())]
        ]
    check_alike(found)
    if json is not None:
        write_file(json, found[0].model_dump_json(indent=2) + "\n")
    out.print(simulated(found[0], found[1:]))


@app.command()
def pack(
    model: Model,
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the packed checkpoint; must not exist.")],
    dtype: Annotated[Dtype, typer.Option(help="Round weights to it first; auto keeps them to the bit.")] = Dtype.auto,
    trust_remote_code: TrustOption = False,
) -> None:
    """Store a pruned checkpoint as bits and kept values: smaller, and run as it is by eval, generate and bench."""
    from besa.checkpoint.packing import pack as pack_checkpoint
    from besa.show import packed, progress_bar

    with progress_bar(err) as tracker:
        found = pack_checkpoint(
            model, out_dir, dtype=dtype.value, trust_remote_code=trust_remote_code, progress=tracker
        )
    out.print(packed(found, out_dir))


@app.command()
def unpack(
    model: Annotated[str, typer.Argument(metavar="PACKED", help="Folder that `besa pack` wrote.")],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the dense checkpoint; must not exist.")],
    trust_remote_code: TrustOption = False,
) -> None:
    """Make a packed checkpoint dense again, as transformers loads it, to the bit."""
    from besa.checkpoint.packing import unpack as unpack_checkpoint
    from besa.show import progress_bar

    with progress_bar(err) as tracker:
        unpack_checkpoint(model, out_dir, trust_remote_code=trust_remote_code, progress=tracker)
    out.print(Text(f"{out_dir}: the checkpoint as it was before packing"))


@app.command("generate")
def generate_command(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, help="Of the draw; 0 takes the likeliest token each time.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: DeviceOption = Device.cpu,
    dtype: DtypeOption = Dtype.auto,
    trust_remote_code: TrustOption = False,
) -> None:
    """Continue a text with a model, packed or not, word by word."""
    from besa.runtime.generation import generate
    from besa.show import progress_bar

    with progress_bar(err) as tracker:
        generate(
            model,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            device=device.value,
            dtype=dtype.value,
            trust_remote_code=trust_remote_code,
            tell=lambda text: out.print(Text(text), end=""),
            progress=tracker,
        )
    out.print()


@app.command("bench")
def bench_command(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL [PACKED...]", help="Models; the others are compared with the first.")
    ],
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each kind; one more comes before.")] = 7,
    device: DeviceOption = Device.cpu,
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure tokens a second, time to the first token and memory of models, beside what reading their bytes allows."""
    from besa.checkpoint.files import write_file
    from besa.runtime.speed import bench
    from besa.show import benched, progress_bar

    with progress_bar(err) as tracker:
        found = bench(
            models,
            rounds=rounds,
            device=device.value,
            dtype=dtype.value,
            trust_remote_code=trust_remote_code,
            progress=tracker,
        )
    if json is not None:
        write_file(json, found.model_dump_json(indent=2) + "\n")
    out.print(benched(found))


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders that `besa prune` wrote, or with a besa_eval.json.")
    ],
    page: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page to write.")] = Path("report.html"),
) -> None:
    """Put runs side by side on one self-contained HTML page."""
    from besa.checkpoint.files import write_file
    from besa.report import load_run, render

    write_file(page, render([load_run(run) for run in runs]))
    out.print(f"Report: {page}")


@app.command("paper")
def paper_command(
    results: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the experiments' results.")] = Path(
        "experiments/results"
    ),
) -> None:
    """List the paper's tables and figures: what it found, what was found here, and whether the trend holds."""
    from besa.paper import findings
    from besa.show import listed

    out.print(listed(findings(results)))


def main() -> None:
    """Entry point of `besa`: a sentence and exit code 2 for bad input, 130 after Ctrl-C."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = _note
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="besa", standalone_mode=False)
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
    except BesaError as error:
        _refuse(str(error))
    except UsageError as error:
        _refuse(f"{error.format_message().rstrip('.')}: see `{error.ctx.command_path} --help`.")
    except Interrupted as interruption:
        err.print("besa:", Text(str(interruption)), highlight=False, soft_wrap=True)
        sys.exit(130)
    except (KeyboardInterrupt, typer.Abort):
        err.print("besa: interrupted; what was under way was not kept.", highlight=False)
        sys.exit(130)


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a notice as a line; of other warnings, which are for developers, as much as Python would."""
    if issubclass(category, Notice):
        err.print("besa:", Text(str(message)), style="yellow", highlight=False, soft_wrap=True)
    else:
        err.print(
            Text(warnings.formatwarning(message, category, filename, lineno, line)),
            highlight=False,
            soft_wrap=True,
            end="",
        )


def _words(text: str) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(option: str, text: str, kind: type[Number]) -> list[Number]:
    """Numbers between commas.

    Raises:
        BesaError: something else.
    """
    try:
        return [kind(word) for word in _words(text)]
    except ValueError:
        raise BesaError(f"{option} {text}: give a number, or several by commas.") from None


def _files(pairs: list[str] | None) -> dict[str, str]:
    """NAME=FILE pairs.

    Raises:
        BesaError: something else.
    """
    files = {}
    for pair in pairs or ():
        name, separator, file = pair.partition("=")
        if not separator or not file:
            raise BesaError(f"--data {pair}: write it as NAME=FILE, such as ptb=ptb.test.txt.")
        files[name] = file
    return files


def _refuse(sentence: str) -> None:
    err.print("besa:", Text(" ".join(sentence.split())), style="red", highlight=False, soft_wrap=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
