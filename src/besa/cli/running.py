"""Commands for sparse checkpoints: pack, unpack, generate, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from besa.cli.consoles import give, out
from besa.cli.options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    Head,
    JsonOption,
    JsonProgressOption,
    Model,
    QuietOption,
    TrustOption,
    check_files,
)
from besa.errors import BesaError

commands = typer.Typer()
PANEL = "Run"


@commands.command(rich_help_panel=PANEL)
def pack(
    model: Model,
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the packed checkpoint; must not exist.")],
    dtype: Annotated[Dtype, typer.Option(help="Round weights to it before packing; auto does not round.")] = Dtype.auto,
    head: Annotated[
        Head, typer.Option(help="How to store the head and the embeddings: int8 rounds them to codes of eight bits.")
    ] = Head.same,
    json: JsonOption = None,
    quiet: QuietOption = False,
    json_progress: JsonProgressOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Store a pruned checkpoint as bitmasks and kept values. It is smaller, and eval, generate and bench run it."""
    from besa.checkpoint.packing import pack as pack_checkpoint
    from besa.cli.show.running import packed
    from besa.cli.tracking import show_progress

    check_files(out_dir, json, json_progress)
    with show_progress(quiet=quiet, json_progress=json_progress) as tracker:
        result = pack_checkpoint(
            model,
            out_dir,
            dtype=dtype.value,
            head=head.value,
            trust_remote_code=trust_remote_code,
            progress=tracker,
        )
    give(result, packed(result, out_dir), json)


@commands.command(rich_help_panel=PANEL)
def unpack(
    model: Annotated[str, typer.Argument(metavar="PACKED", help="Folder that `besa pack` wrote.")],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the dense checkpoint; must not exist.")],
    quiet: QuietOption = False,
    json_progress: JsonProgressOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Make a packed checkpoint dense again, with the numbers that were packed, for transformers."""
    from besa.checkpoint.packing import unpack as unpack_checkpoint
    from besa.cli.tracking import show_progress

    check_files(out_dir, None, json_progress)
    with show_progress(quiet=quiet, json_progress=json_progress) as tracker:
        unpack_checkpoint(model, out_dir, trust_remote_code=trust_remote_code, progress=tracker)
    out.print(Text(f"{out_dir}: the checkpoint as it was before it was packed"))


@commands.command("generate", rich_help_panel=PANEL)
def generate_command(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Question to answer, or text to continue; default: a chat that reads a question from each line."
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Answer in the model's chat template, or continue the prompt as a text; default: chat, if the model "
            "has a template.",
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Instructions that a chat begins with, instead of the template's."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens at most; default: 1024 for an answer, 128 for a continuation.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling; default: 0.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
    quiet: QuietOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Chat with a model, packed or not, or continue a text, word by word."""
    from besa.cli.chatting import chat as chat_in_terminal
    from besa.cli.chatting import say
    from besa.cli.tracking import show_progress
    from besa.data.arguments import check_used
    from besa.runtime.conversation import Conversation
    from besa.runtime.generation import answer, check_text, open_writer

    check_used("a --temperature above 0", temperature, {"--seed": seed is not None})
    if prompt is not None:
        check_text(prompt, "prompt")
    elif chat is False:
        raise BesaError("Without a chat there is a text to continue: give it with --prompt.")
    with show_progress(quiet=quiet) as tracker:
        writer, chats = open_writer(
            model,
            chat=chat,
            system=system,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed or 0,
            device=device,
            dtype=dtype.value,
            trust_remote_code=trust_remote_code,
            progress=tracker,
        )
    if prompt is not None:  # no bar is on the terminal while words appear
        answer(writer, chats, prompt, system, say)
        out.print()
        return
    if not chats:
        raise BesaError(f"{model} has no chat template, so it continues texts: give one with --prompt.")
    chat_in_terminal(Conversation(writer, system))


@commands.command("bench", rich_help_panel=PANEL)
def bench_command(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL [PACKED...]", help="Models; the others are compared with the first.")
    ],
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Measurements of each kind, after one warm-up.")] = 7,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = None,
    quiet: QuietOption = False,
    json_progress: JsonProgressOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure tokens a second, time to the first token and memory of models, and the limit of the memory bandwidth."""
    from besa.cli.show.running import benched
    from besa.cli.tracking import show_progress
    from besa.runtime.speed import bench

    with show_progress(quiet=quiet, json_progress=json_progress) as tracker:
        result = bench(
            models,
            rounds=rounds,
            device=device,
            dtype=dtype.value,
            trust_remote_code=trust_remote_code,
            progress=tracker,
        )
    give(result, benched(result), json)
