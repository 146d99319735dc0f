"""besa beside llama.cpp: the same model, machine and threads, measured in turn.

    python -m benchmarks.peers.llamacpp shape 1B 16
    python -m benchmarks.peers.llamacpp smollm2 --pruned "besa 50 %"=FOLDER --pruned "best-int4"=FOLDER

The first takes random weights, half of them pruned by magnitude. The second takes checkpoints that `besa prune` wrote
of the embedded model, and also measures perplexity. Both write a JSON, a table and a plot to results/, with the ending
of `processors.ending`. llama.cpp is built at the first call, which takes minutes. See README.md.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import besa
from benchmarks.peers import gguf_files
from benchmarks.peers.llama_tools import VERSION, Tools, built
from benchmarks.peers.quality import plot, table
from benchmarks.processors import ending
from benchmarks.random_model import config, quantized, write
from besa.data.assets import fetch
from besa.evaluation.texts import read_texts
from besa.runtime.fastest import fastest
from besa.runtime.speed import step_bytes
from besa.system.machine import machine, versions

RESULTS = Path(__file__).parents[1] / "results"
KINDS = ("BF16", "Q8_0", "Q4_0")
PROMPT = 512  # tokens
CONTEXT = 8  # tokens that besa decodes after
READ = 1 << 30  # bytes read to measure the bandwidth, too many for any cache
TEMPORARY = Path(tempfile.gettempdir())
app = typer.Typer(help=__doc__, add_completion=False)
Rounds = Annotated[int, typer.Option(help="Measurements of each kind, after one that is not counted.")]
Steps = Annotated[int, typer.Option(help="Tokens decoded in a measurement.")]
Folder = Annotated[Path, typer.Option(help="Where models are written; needs five times their size.")]
Jobs = Annotated[int, typer.Option(help="Compilers at a time, if llama.cpp is not built yet.")]
CORES = os.cpu_count() or 1


@dataclass
class Contender:
    """A model in one form.

    Attributes:
        name: of the form.
        maker: ``besa`` or ``llama.cpp``.
        file_bytes: of its weight files.
        decode: tokens a second of decoding so many tokens.
        prompt: tokens a second of a prompt.
        perplexity: measures it.
        step_bytes: of weights that a decoding step reads, where besa knows them.
        paces: what was measured, by work.
    """

    name: str
    maker: str
    file_bytes: int
    decode: Callable[[int], float]
    prompt: Callable[[], float]
    perplexity: Callable[[], float]
    step_bytes: int | None = None
    paces: dict[str, list[float]] = field(default_factory=lambda: {"decode": [], "prompt": []})


@dataclass(frozen=True)
class Windows:
    """The text that perplexity is measured on: its second halves of windows, as llama.cpp does.

    Attributes:
        file: the text.
        tokens_WT: its tokens.
    """

    file: Path
    tokens_WT: Tensor

    @torch.inference_mode()
    def perplexity(self, model: PreTrainedModel) -> float:
        """Of a model of besa."""
        half, total = self.tokens_WT.shape[1] // 2, 0.0
        for tokens_1T in self.tokens_WT.split(1):
            logits_TV = model(tokens_1T, use_cache=False).logits[0, half:-1].float()
            total += float(cross_entropy(logits_TV, tokens_1T[0, half + 1 :], reduction="sum"))
        return math.exp(total / (len(self.tokens_WT) * (half - 1)))


@app.command()
def shape(
    name: str,
    blocks: int,
    sparsity: float = 0.5,
    rounds: Rounds = 7,
    steps: Steps = 32,
    folder: Folder = TEMPORARY,
    jobs: Jobs = CORES,
) -> None:
    """A Llama of random bfloat16 weights, pruned by magnitude; besa also has it in codes of 8 and 4 bits."""
    tools = Tools(built(jobs), torch.get_num_threads())
    with _place(folder) as place:
        write(place / "dense", config(name, blocks), sparsity=sparsity)
        _as_gguf(tools, place, None)
        contenders = [*_of_llama(tools, place, None), _dense(place / "dense", None)]
        contenders.append(_packed(place, "half-sparse bfloat16", place / "dense", None))
        for bits, group in ((8, None), (4, 64)):
            codes = place / f"codes-{bits}"
            quantized(place / "dense", codes, bits, group)
            contenders.append(_packed(place, f"half-sparse {bits} bits", codes, None))
            shutil.rmtree(codes)
        _measure(contenders, rounds, steps)
        _write(f"peers-llamacpp-{name}-{blocks}", contenders, {"sparsity": sparsity, "rounds": rounds, "steps": steps})


@app.command()
def smollm2(
    pruned: Annotated[list[str], typer.Option(help="NAME=FOLDER of a checkpoint that `besa prune` wrote.")],
    text: Annotated[
        str, typer.Option(help="For perplexity: a name or a file, as `besa eval` takes it.")
    ] = "encyclopedia",
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens of the text.")] = 40,
    rounds: Rounds = 7,
    steps: Steps = 32,
    folder: Folder = TEMPORARY,
    jobs: Jobs = CORES,
) -> None:
    """The embedded SmolLM2-135M and pruned checkpoints of it, with perplexity."""
    tools = Tools(built(jobs), torch.get_num_threads())
    with _place(folder) as place:
        model = besa.load("smollm2", dtype="bfloat16", device="cpu")
        model.save_pretrained(place / "dense")
        del model
        _as_gguf(tools, place, fetch("smollm2"))
        measured = _windows(tools, place, text, windows)
        contenders = _of_llama(tools, place, measured)
        contenders.append(_dense(place / "dense", measured))
        for one in pruned:
            name, _, checkpoint = one.partition("=")
            contenders.append(_packed(place, name, Path(checkpoint).absolute(), measured))
        _measure(contenders, rounds, steps)
        facts = {"text": text, "windows": len(measured.tokens_WT), "rounds": rounds, "steps": steps}
        _write("peers-llamacpp-smollm2", contenders, facts, {one.name: one.perplexity() for one in contenders})


@contextmanager
def _place(folder: Path) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="besa-peers-", dir=folder))
    try:
        yield place
    finally:
        shutil.rmtree(place)


def _as_gguf(tools: Tools, place: Path, tokenizer: Path | None) -> None:
    """Write the dense model in llama.cpp's kinds; the tokenizer is that of a .gguf file."""
    gguf_files.write(place / "dense", place / "BF16.gguf", tokenizer)
    for kind in KINDS[1:]:
        tools.quantize(place / "BF16.gguf", place / f"{kind}.gguf", kind)


def _windows(tools: Tools, place: Path, text: str, windows: int) -> Windows:
    """The text as a file, and its tokens as llama.cpp splits it: transformers splits a few words otherwise."""
    (read,) = read_texts([text], {})
    whole = read.separator.join([*read.parts, *read.further])
    (place / "text").write_text(whole, encoding="utf-8")
    tokens_L = torch.tensor(tools.tokens(place / "BF16.gguf", place / "text"))
    windows = min(windows, len(tokens_L) // PROMPT)
    return Windows(place / "text", tokens_L[: windows * PROMPT].view(windows, PROMPT))


def _of_llama(tools: Tools, place: Path, windows: Windows | None) -> list[Contender]:
    """The dense model in llama.cpp's kinds."""
    files = {kind: place / f"{kind}.gguf" for kind in KINDS}

    def contender(kind: str, file: Path) -> Contender:
        return Contender(
            kind,
            "llama.cpp",
            file.stat().st_size,
            lambda steps: tools.pace(file, 0, steps),
            lambda: tools.pace(file, PROMPT, 0),
            lambda: tools.perplexity(file, windows.file, PROMPT, len(windows.tokens_WT)) if windows else math.nan,
        )

    return [contender(kind, file) for kind, file in files.items()]


def _dense(folder: Path, windows: Windows | None) -> Contender:
    """The dense model in the fastest form of torch."""
    model = besa.load(folder, device="cpu")
    size, read = _size(folder), step_bytes(model)
    _, model = fastest(model) or ("", model)
    return _of_besa("dense", model, size, read, windows)


def _packed(place: Path, name: str, checkpoint: Path, windows: Windows | None) -> Contender:
    """A pruned checkpoint, packed. If its weights are codes, its head and embeddings are too."""
    coded = "quantization_config" in json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    out = place / f"packed-{checkpoint.name}"
    dtype = "auto" if coded else "bfloat16"
    besa.pack(checkpoint, out, dtype=dtype, head="int8" if coded else "same")
    model = besa.load(out, device="cpu", dtype="bfloat16")
    return _of_besa(name, model, _size(out), step_bytes(model), windows)


def _of_besa(name: str, model: PreTrainedModel, size: int, read: int, windows: Windows | None) -> Contender:
    vocabulary = model.config.vocab_size
    tokens_1T = torch.randint(vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def decode(steps: int) -> float:
        output = model(tokens_1T[:, :CONTEXT], use_cache=True, logits_to_keep=1)
        began = time.perf_counter()
        for _ in range(steps):
            next_11 = output.logits[:, -1:].argmax(dim=-1)
            output = model(next_11, past_key_values=output.past_key_values, use_cache=True)
        return steps / (time.perf_counter() - began)

    @torch.inference_mode()
    def prompt() -> float:
        began = time.perf_counter()
        model(tokens_1T, logits_to_keep=1)
        return PROMPT / (time.perf_counter() - began)

    measure = (lambda: windows.perplexity(model)) if windows else (lambda: math.nan)
    return Contender(name, "besa", size, decode, prompt, measure, read)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _measure(contenders: list[Contender], rounds: int, steps: int) -> None:
    """Each does each work once in a round, in turn, so that a slow minute affects all; the first is not counted."""
    for turn in range(rounds + 1):
        for one in contenders[:: -1 if turn % 2 else 1]:
            paces = {"decode": one.decode(steps), "prompt": one.prompt()}
            shown = ", ".join(f"{work} {pace:,.1f}" for work, pace in paces.items())
            print(f"round {turn}: {one.maker} {one.name}: {shown} tokens a second", flush=True)
            for work, pace in paces.items() if turn else ():
                one.paces[work].append(pace)


def _bandwidth() -> float:
    """Bytes a second that this machine reads, at best."""
    read = torch.zeros(READ // 4)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        read.sum()
        times.append(time.perf_counter() - began)
    return READ / min(times)


def _write(
    name: str, contenders: list[Contender], facts: dict[str, Any], perplexities: dict[str, float] | None = None
) -> None:
    found = [
        {
            "maker": one.maker,
            "form": one.name,
            "file_bytes": one.file_bytes,
            "step_bytes": one.step_bytes,
            **{work: {"middle": median(paces), "all": paces} for work, paces in one.paces.items()},
            **({"perplexity": perplexities[one.name]} if perplexities else {}),
        }
        for one in contenders
    ]
    about = {"llama-cpp-python": VERSION, "bandwidth": _bandwidth(), "machine": machine(torch.device("cpu"))}
    result = facts | about | {"versions": versions(), "models": found}
    name += ending()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(table(found), encoding="utf-8")
    if perplexities:
        (RESULTS / f"{name}.svg").write_text(plot(found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    app()
