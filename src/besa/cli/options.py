"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Container
from enum import StrEnum
from fnmatch import fnmatchcase
from json import loads as read_json
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from besa.cli import completing
from besa.cli.consoles import STDOUT
from besa.errors import BesaError
from besa.storage.companion_names import is_read
from besa.storage.names import nearest, path_of

Number = TypeVar("Number", int, float)
BESIDE = "..4194304.partial"  # what the name that a file is first written by has more (`storage.writing.replacing`)
RECORD = "besa_run.json"  # `besa.record.RECORD_NAME`, whose module takes a while to import
CONFIG, CARD = "config.json", "README.md"  # as in `besa.models.hub`, which takes a while too
RESERVED = (RECORD, "tokenizer*", "*.safetensors", "*.index.json", "compare.json", "compare.md", "compare.svg")
SAMPLES = 128  # calibration sequences, as in the paper
CALIBRATION = "mix"  # of the embedded texts: the best of three by the mean of the domains (docs/log.md)


class Bos(StrEnum):
    """Whether sequences begin with the token that begins a text."""

    auto = "auto"
    yes = "yes"
    no = "no"


class Dtype(StrEnum):
    """Floating-point format of weights and computation; auto is the checkpoint's."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Head(StrEnum):
    """How a packed checkpoint has its head and embeddings."""

    same = "same"
    int8 = "int8"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Hugging Face id (also ID@REVISION), folder, .gguf file, or smollm2 (embedded)."
    ),
]
FILES = "a file of JSON (lines or an array, with fields named text), parquet or plain text, also .gz or .zst"
CalibrationOption = Annotated[
    str,
    typer.Option(
        metavar="TEXT",
        help="Text to calibrate on: c4, wiki, code, technical or multilingual (embedded); mix, equal shares of these; "
        f"self, which the dense model writes; {FILES}; or hf:<dataset>. Several by weight: c4:0.5,self:0.5.",
    ),
]
ChatOption = Annotated[
    bool,
    typer.Option("--chat", help="Calibrate on dialogues in the model's chat template, made from the text."),
]
EvaluationOption = Annotated[
    list[str] | None,
    typer.Option(
        "--ppl",
        metavar="TEXTS",
        help="Measure perplexity on texts, by commas or repeatable: wikitext2, ptb, c4, the papers' test sets; domains "
        "(web, encyclopedia, code, technical, languages: embedded, never calibrated on; each can be named alone); or "
        f"another text: wiki (embedded), {FILES}, or hf:<dataset>.",
    ),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="NAME=FILE", help="Local file of a test set, instead of a download (repeatable)."),
]
TasksOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAMES",
        help="Zero-shot tasks, by commas or repeatable: piqa, boolq, hellaswag, winogrande, arc_easy, arc_challenge.",
    ),
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Ask only this number of questions of each task.")]
HubOption = Annotated[
    bool, typer.Option("--hub", help="Use the questions from the Hugging Face Hub instead of the embedded ones.")
]
DeviceOption = Annotated[
    str,
    typer.Option(
        metavar="DEVICE",
        autocompletion=completing.device,
        help="Where to compute: cpu, cuda, cuda:N, mps or xpu; auto: the first CUDA device, else the CPU.",
    ),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Dtype of weights and computation; auto: the checkpoint's.")]
BatchOption = Annotated[
    int | None, typer.Option(min=1, help="Sequences in a forward pass; default: about 2048 tokens, on a GPU 8192.")
]
MeasuredBatchOption = Annotated[
    int | None,
    typer.Option(
        "--batch", min=1, help="Windows, or answers, in a forward pass; default: about 2048 tokens, and 16 answers."
    ),
]
RecipeOption = Annotated[
    str,
    typer.Option(
        autocompletion=completing.recipe,
        help="besa, fast, best, wanda, sparsegpt, … (`besa recipes` lists them), or a YAML file.",
    ),
]
SparsityOption = Annotated[
    float | None, typer.Option(help="Share of the prunable weights to set to zero; default: the recipe's.")
]
PassesOption = Annotated[
    float | None,
    typer.Option(
        help="Budget of the run in forward passes over the calibration set, such as 20, 60 or 200. It sets the number "
        "of fine-tuning or distillation epochs. Default: the recipe's.",
    ),
]
MinutesOption = Annotated[
    float | None,
    typer.Option(
        help="Minutes for the whole run: it distils for as many epochs as should fit. Not together with --passes.",
    ),
]
DequantizedOption = Annotated[
    bool, typer.Option("--dequantized", help="Write quantised weights as dense numbers, not as codes.")
]
SamplesOption = Annotated[int, typer.Option(min=1, max=1_000_000, help="Calibration sequences.")]
SeqlenOption = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens of a calibration sequence; default: 2048, or as many as the model has positions."),
]
WITH_BOS = (
    "with the tokenizer's BOS token; auto: if the tokenizer adds one by default, but not for Llama and OPT, whose "
    "published figures have none."
)
BosOption = Annotated[Bos, typer.Option(help=f"Begin calibration sequences {WITH_BOS}")]
WindowBosOption = Annotated[Bos, typer.Option(help=f"Begin windows {WITH_BOS}")]
BothBosOption = Annotated[Bos, typer.Option(help=f"Begin calibration sequences and windows {WITH_BOS}")]
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
    typer.Option("--skip", metavar="PATTERN", help="Leave matching linears dense, such as '*.k_proj' (repeatable)."),
]
SparsityOfOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sparsity-of",
        metavar="PATTERN=S",
        help="Set the sparsity of each linear that matches, such as '*.0.*=0.3' (repeatable).",
    ),
]
BudgetOption = Annotated[
    float | None,
    typer.Option(
        "--activation-budget",
        min=0,
        help="GB for stored hidden states: this much on the GPU and this much in main memory; the rest goes to disk. "
        "Default: a quarter of the free GPU memory and half of the free main memory.",
    ),
]


def to_write(context: typer.Context, file: Path | None) -> Path | None:
    """Check before the work that a command can write this file at its end: a new file, or one that it replaces.

    Raises:
        BesaError: the file cannot be written, is a folder, a link or a device, has the name of a checkpoint's file or
            of a comparison's, is the card of the checkpoint in its folder or in the record of it, or is that of both
            `--json` and `--json-progress`.
    """
    if file is not None:
        if is_read(file.name) or any(fnmatchcase(file.name, pattern) for pattern in RESERVED):
            raise BesaError(
                f"{file} has the name of a file that checkpoints or comparisons are made of: choose another name."
            )
        card = file.name == CARD and any((file.parent / name).exists() for name in (CONFIG, RECORD))
        if card or file.name in _listed(file.parent / RECORD):
            raise BesaError(f"{file} is a file of the checkpoint in its folder: choose another name.")
        folder = nearest(path_of(file).absolute().parent)
        no_file = os.path.lexists(file) and not stat.S_ISREG(file.lstat().st_mode)
        if no_file or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise BesaError(f"No file can be written to {file}: give a file name in a folder that you can write to.")
        path_of(file.with_name(f"{file.name}{BESIDE}"))
        others = (context.params.get(name) for name in ("json", "json_progress"))  # what was read before this option
        if any(path_of(other).absolute() == path_of(file).absolute() for other in others if other is not None):
            raise BesaError(f"--json and --json-progress are both {file}: choose two names.")
    return file


def _listed(record: Path) -> Container[str]:
    """The names of the files that a record has digests of; none if there is no such record."""
    try:
        return frozenset(read_json(record.read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ()


def to_write_or_print(context: typer.Context, file: Path | None) -> Path | None:
    """Check a file as `to_write` does; `-` is standard output, which is always allowed.

    Raises:
        BesaError: as `to_write`.
    """
    return file if file == STDOUT else to_write(context, file)


def check_files(out: Path, json: Path | None, json_progress: Path | None) -> None:
    """Check that files beside a new folder do not stand in its way.

    Args:
        out: the folder, which must not exist yet.
        json: of `--json`.
        json_progress: of `--json-progress`.

    Raises:
        BesaError: the folder has no name, a result is to be where it will be, or progress in it.
    """
    if out == Path():  # which an empty argument is, too
        raise BesaError("OUT is empty, or the folder that you are in: give the name of a new folder.")
    check_result(out, json)
    folder = path_of(out).absolute()
    if json_progress is not None and folder in (here := path_of(json_progress).absolute(), *here.parents):
        raise BesaError(f"--json-progress {json_progress} lies in {out}, which is not there yet: choose another place.")


def check_result(out: Path, json: Path | None) -> None:
    """Check that the file of `--json` is not the folder of `--out`.

    Raises:
        BesaError: it is.
    """
    if json not in (None, STDOUT) and path_of(json).absolute() == path_of(out).absolute():
        raise BesaError(f"--json {json} is the folder that will be written: choose another name.")


JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=to_write_or_print,
        help="Write the result as JSON to a file too; - prints the JSON instead of the usual output.",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Show no progress; results, notices and errors stay.")]
JsonProgressOption = Annotated[
    Path | None,
    typer.Option(
        "--json-progress",
        metavar="FILE",
        callback=to_write,
        help="Add progress to a file, one JSON object a line (docs/formats.md).",
    ),
]


def bytes_of(gigabytes: float | None) -> int | None:
    """The bytes of `--activation-budget`.

    Raises:
        BesaError: it is no finite number.
    """
    if gigabytes is None:
        return None
    if not math.isfinite(1e9 * gigabytes):
        raise BesaError(f"--activation-budget {gigabytes}: give a number of GB.")
    return round(1e9 * gigabytes)


def words(text: str) -> list[str]:
    """The words of a text with commas between them."""
    return [word.strip() for word in text.split(",") if word.strip()]


def names(values: list[str] | None) -> list[str]:
    """The names of an option that may be repeated, and has several by commas; the name of a file may have commas."""
    each = ([value] if _is_file(value) else words(value) for value in values or ())
    return [name for of_value in each for name in of_value]


def _is_file(value: str) -> bool:
    try:
        return path_of(value).is_file()
    except (OSError, ValueError):  # no file can have that name
        return False


def numbers(option: str, text: str, kind: type[Number]) -> list[Number]:
    """The numbers of a text with commas between them.

    Raises:
        BesaError: a word is no number.
    """
    try:
        return [kind(word) for word in words(text)]
    except ValueError:
        raise BesaError(f"{option} {text}: give a number, or several separated by commas.") from None


def counts(option: str, text: str) -> list[int]:
    """The whole numbers from 1 of a text with commas between them, at least one.

    Raises:
        BesaError: there is none, or a word is no such number.
    """
    found = numbers(option, text, int)
    if not found:
        raise BesaError(f"{option} is empty: give a number, or several separated by commas.")
    if min(found) < 1:
        raise BesaError(f"{option} {text}: give whole numbers from 1.")
    return found


def files_of(pairs: list[str] | None) -> dict[str, str]:
    """The files of NAME=FILE pairs, by name.

    Raises:
        BesaError: a pair is written in another form, or a name is given twice.
    """
    files: dict[str, str] = {}
    for pair in pairs or ():
        name, separator, file = pair.partition("=")
        if not separator or not file:
            raise BesaError(f"--data {pair}: write it as NAME=FILE, such as ptb=ptb.test.txt.")
        if name in files:
            raise BesaError(f"--data {name} is given twice: give it once.")
        files[name] = file
    return files
